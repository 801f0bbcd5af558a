"""Distance targets: every backend against the golden archives, the reference and the rules; accepted masks; errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import DLPackArray
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import portable, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    mask = (torch.rand(2, 7, 9, device=device) > 0.5).to(torch.uint8)
    torch.library.opcheck(torch.ops.semimoe_fast.squared_distance.default, (mask,))
    torch.library.opcheck(torch.ops.semimoe_fast.distance_targets.default, (mask, 2.0))


@pytest.fixture(params=ops.BACKENDS)
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SEMIMOE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("archive", ["targets", "targets_glas"])
def test_golden_targets(archive: str, any_backend: str, golden) -> None:
    masks = golden(archive)
    for name in sorted({key.split("/")[0] for key in masks}):
        sdf, boundary = F.distance_targets(masks[f"{name}/mask"])
        np.testing.assert_array_equal(boundary, masks[f"{name}/boundary"], err_msg=name)
        np.testing.assert_allclose(sdf, masks[f"{name}/sdf"], rtol=0, atol=1e-6, err_msg=name)  # a float32 quotient


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20)),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_backends_agree_on_targets(shape, density, seed) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    expected = reference.squared_distance(masks)
    torch.testing.assert_close(portable.squared_distance(masks), expected, rtol=0, atol=0)
    torch.testing.assert_close(F.squared_distance(masks), expected, rtol=0, atol=0)
    sdf, boundary = F.distance_targets(masks, 1.5)
    expected_sdf, expected_boundary = reference.distance_targets(masks, 1.5)
    torch.testing.assert_close(sdf, expected_sdf, rtol=0, atol=1e-6)  # float32 root and quotient, float64 reference
    torch.testing.assert_close(boundary, expected_boundary, rtol=0, atol=0)
    for mask, squared, field, ring in zip(masks, expected, sdf, boundary, strict=True):
        check_target_rules(mask, squared, field, ring, 1.5)


def check_target_rules(mask: Tensor, squared: Tensor, sdf: Tensor, ring: Tensor, radius: float) -> None:
    if (squared < 0).all():
        assert (sdf == (1.0 if mask.all() else -1.0)).all()
        assert not ring.any()
        return
    assert ((sdf >= 0) == mask).all()
    assert sdf[~mask].min() == -1
    assert (sdf[mask & (squared == 1)] == 0).all()
    assert sdf.max() == (1 if (squared[mask] > 1).any() else 0)
    assert ((ring != 0) == (~mask & (squared <= radius * radius))).all()


@pytest.mark.parametrize("square", [0, 1, 2, 13, 18, 29, 52, 53, 25_000_000, 25_000_001])
def test_the_ring_holds_pixels_whose_distance_is_its_radius(square: int, any_backend: str) -> None:
    """The float64 square of math.sqrt(13) is below 13, and 25,000,000 and the next integer are one float32."""
    mask = torch.zeros(1, *((2, 5_003) if square > 100 else (9, 9)), dtype=torch.uint8)
    mask[0, 0, 0] = 1
    radius = math.sqrt(square)
    _, ring = F.distance_targets(mask, radius)
    rows, columns = torch.meshgrid(*map(torch.arange, mask.shape[1:]), indexing="ij")
    squared = rows.square() + columns.square()
    assert torch.equal(ring[0] != 0, (squared > 0) & (squared <= square))
    _, smaller = F.distance_targets(mask, math.nextafter(radius, 0))
    assert torch.equal(smaller[0] != 0, (squared > 0) & (squared < square))


@pytest.mark.parametrize("shape", [(46_340, 1), (1, 3_000), (3_000, 2)])
def test_long_images(shape: tuple[int, int]) -> None:
    """One foreground pixel in a corner: distances up to the whole length."""
    mask = torch.zeros(1, *shape, dtype=torch.uint8)
    mask[0, 0, 0] = 1
    y, x = (torch.arange(side) for side in shape)
    expected = (y[:, None] ** 2 + x**2).to(torch.int32)
    expected[0, 0] = 1
    for function in (portable.squared_distance, F.squared_distance):
        torch.testing.assert_close(function(mask)[0], expected, rtol=0, atol=0)


MASK = np.random.default_rng(0).random((3, 6, 10)) < 0.4


def read_only(mask: np.ndarray) -> np.ndarray:
    mask = mask.copy()
    mask.flags.writeable = False
    return mask


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: torch.from_numpy(m),
        lambda m: torch.from_numpy(m.astype(np.uint8) * 255),
        lambda m: torch.from_numpy(m.astype(np.int64) * -7),
        lambda m: torch.from_numpy(m.astype(np.int32) * 65536),
        lambda m: torch.from_numpy(np.ascontiguousarray(m.transpose(2, 1, 0))).permute(2, 1, 0),
        lambda m: m,
        lambda m: m.astype(np.uint16) * 4096,
        lambda m: m.astype(np.uint64) * 2**40,
        lambda m: np.asfortranarray(m),
        lambda m: m[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
        read_only,
    ],
    ids="bool 0/255 negative int32 permuted numpy uint16 uint64 fortran negative-strides read-only".split(),
)
def test_any_integer_mask(convert) -> None:
    expected = reference.squared_distance(torch.from_numpy(MASK))
    torch.testing.assert_close(F.squared_distance(convert(MASK)), expected, rtol=0, atol=0)
    torch.testing.assert_close(F.squared_distance(convert(MASK)[1]), expected[1], rtol=0, atol=0)


def test_mask_through_dlpack() -> None:
    mask = MASK.astype(np.int32)
    torch.testing.assert_close(F.squared_distance(DLPackArray(mask)), F.squared_distance(mask), rtol=0, atol=0)
    ids = np.arange(mask.size, dtype=np.int32).reshape(mask.shape) // 7
    results = [F.squared_distance(labels, instances=True) for labels in (DLPackArray(ids), ids)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("convert", [torch.from_numpy, lambda mask: mask], ids=["torch", "numpy"])
def test_float_mask_of_zeros_and_ones(convert) -> None:
    expected = F.squared_distance(MASK)
    torch.testing.assert_close(F.squared_distance(convert(MASK.astype(np.float32))), expected, rtol=0, atol=0)


def test_mask_with_a_channel_gives_results_with_a_channel() -> None:
    mask = torch.from_numpy(MASK)
    pairs = zip(F.distance_targets(mask[:, None]), F.distance_targets(mask), strict=True)
    for result, expected in (*pairs, (F.squared_distance(mask[:, None]), F.squared_distance(mask))):
        torch.testing.assert_close(result, expected[:, None], rtol=0, atol=0)


@pytest.mark.parametrize("library", ["cupy", "numba.cuda"])
def test_device_arrays_of_other_libraries(library: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    module = pytest.importorskip(library)
    if not module.is_available():
        pytest.skip(f"{library} finds no CUDA device")
    mask = MASK.astype(np.int32) * 65536
    array = module.asarray(mask) if library == "cupy" else module.to_device(mask)
    squared = F.squared_distance(array)
    assert squared.is_cuda
    torch.testing.assert_close(squared.cpu(), F.squared_distance(mask), rtol=0, atol=0)


@pytest.mark.parametrize(("stream", "calls"), [(None, []), (1, ["synchronize"]), (2, ["synchronize"]), (4096, [4096])])
def test_the_stream_of_a_cuda_array_is_waited_for(stream: int | None, calls: list, monkeypatch) -> None:
    """By an array on the CPU that says it is on a GPU: what PyTorch is asked for, before the array is read."""

    array = SimpleNamespace(__cuda_array_interface__={"stream": stream})
    asked, current = [], SimpleNamespace(wait_stream=lambda other: asked.append(other))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer: pointer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch, "as_tensor", lambda other, device: asked.append(device) or torch.from_numpy(MASK))
    torch.testing.assert_close(F.squared_distance(array), F.squared_distance(MASK), rtol=0, atol=0)
    assert asked == [*calls, "cuda"]


def test_an_array_of_another_stream_is_read_when_it_is_written() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("numba.cuda finds no CUDA device")
    stream, size = cuda.stream(), 8192
    mask = cuda.pinned_array((1, size, size), np.int32)
    mask[:], mask[:, :, 0] = 0, 1
    array = cuda.device_array(mask.shape, np.int32, stream=stream)
    for _ in range(8):  # 256 MB each, while the host goes on
        array.copy_to_device(mask, stream=stream)
    squared = F.squared_distance(array)
    assert (squared[0, :, 1:] == torch.arange(1, size, device="cuda") ** 2).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("shape", [(4, 256, 256), (2, 300, 500)], ids=["cluster", "several launches"])
def test_cuda_graph_capture(shape: tuple[int, int, int], instances: bool) -> None:
    maps = [torch.randint(4, shape, device="cuda") for _ in range(2)]
    masks = [ids * (torch.rand(shape, device="cuda") < share) for ids, share in zip(maps, (0.2, 0.001), strict=True)]
    static = masks[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        F.distance_targets(static, instances=instances)  # loads the module outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = F.distance_targets(static, instances=instances)
    for mask in masks:
        static.copy_(mask)
        graph.replay()
        for replayed, eager in zip(captured, F.distance_targets(mask, instances=instances), strict=True):
            assert torch.equal(replayed, eager)


def test_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ops._native, "why_unavailable", lambda device_type: "not built here")
    ops._choose_and_log.cache_clear()
    for _ in range(3):
        F.squared_distance(MASK)
    ops._choose_and_log.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "squared_distance on cpu falls back to the portable backend: not built here"
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: F.squared_distance(torch.full((4, 4), 0.5)),
            TypeError,
            "float32 is ambiguous unless it holds only real 0 and 1: threshold it first",
        ),
        (lambda: F.squared_distance(np.full((4, 4), np.nan)), TypeError, "float64 is ambiguous"),
        (lambda: F.squared_distance(torch.ones(4, 4).cfloat()), TypeError, "complex64 is ambiguous"),
        (lambda: F.squared_distance(torch.zeros(1, 2, 4, 4).bool()), ValueError, "(B, 1, H, W), (B, H, W) or (H, W)"),
        (lambda: F.squared_distance([[0, 1]]), TypeError, "a mask is a tensor or an array, got list: use np.asarray"),
        (lambda: F.squared_distance(torch.zeros(4).bool()), ValueError, "(B, H, W) or (H, W)"),
        (lambda: F.squared_distance(torch.zeros(1).bool().expand(40000, 40000)), ValueError, "too large"),
        (lambda: F.distance_targets(MASK, ring_radius=-1), ValueError, "ring_radius is -1"),
    ],
)
def test_bad_masks_get_one_clear_line(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("radius", [46341.0, 1e6, float("inf")])
@pytest.mark.parametrize("backend", ["reference", "portable", "fused"])
def test_a_ring_of_any_radius(backend, radius):
    mask = torch.zeros(1, 4, 5, dtype=torch.uint8)
    mask[0, 1, 1] = 1
    with ops.backend(backend):
        assert torch.equal(F.distance_targets(mask, radius)[1], 1 - mask)
