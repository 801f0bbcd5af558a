"""Distance targets of instance maps: every backend and instruction set against SciPy, instance by instance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import _native, portable, reference


def scipy_squared_distance(labels: np.ndarray) -> np.ndarray:
    """Squared distances (H, W) to the nearest pixel of another label, -1 without one."""
    squared = np.full(labels.shape, -1, np.int64)
    for label in np.unique(labels):
        if (labels != label).any():
            here = labels == label
            squared[here] = np.rint(distance_transform_edt(here)[here] ** 2)
    return squared


def has_other_instance_beside(labels: np.ndarray) -> np.ndarray:
    """Foreground pixels (H, W) with a 4-neighbor in another instance."""
    height, width = labels.shape
    result = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(height, width):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width:
                result[y, x] |= 0 != labels[y, x] != labels[v, u] != 0
    return result


def territories(height: int, width: int, instances: int, seed: int, background: float = 0.4) -> np.ndarray:
    """Touching instances int32 (H, W): each pixel belongs to the nearest of random centers, or to the background."""
    random = np.random.default_rng(seed)
    centers = random.uniform(0, 1, (instances, 2)) * (height, width)
    y, x = np.indices((height, width))
    distance = np.hypot(y[..., None] - centers[:, 0], x[..., None] - centers[:, 1])
    reach = np.quantile(distance.min(-1), 1 - background)
    return np.where(distance.min(-1) <= reach, distance.argmin(-1) + 1, 0).astype(np.int32)


def check(labels: np.ndarray, squared: Tensor, sdf: Tensor, boundary: Tensor, radius: float = 2) -> None:
    expected = scipy_squared_distance(labels)
    np.testing.assert_array_equal(squared, expected)
    foreground = labels != 0
    ring = ~foreground & (expected > 0) & (expected <= radius * radius)
    np.testing.assert_array_equal(boundary, ring | has_other_instance_beside(labels))
    scaled = np.where(foreground, 1.0, -1.0)
    for side, sign in ((foreground, 1), (~foreground, -1)):
        if side.any() and (expected[side] > 0).all():
            scaled[side] = sign * np.sqrt(expected[side] / expected[side].max())
    scaled[foreground & (expected == 1)] = 0
    np.testing.assert_allclose(sdf, scaled, rtol=0, atol=1e-6)  # float32 root and quotient


@pytest.fixture(params=["reference", "portable", "plain", "avx2", "avx512", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces a backend or an instruction set, and gives the device for its tensors."""
    if request.param == "cuda":
        if reason := _native.why_unavailable("cuda"):
            pytest.skip(reason)
        return "cuda"
    if request.param in ops.BACKENDS:
        monkeypatch.setenv("SEMIMOE_BACKEND", request.param)
    elif request.param in _native.module().instruction_sets:
        monkeypatch.setenv("SEMIMOE_SIMD", request.param)
    else:
        pytest.skip(f"the CPU kernels for {request.param} do not run here")
    return "cpu"


@pytest.mark.parametrize(
    ("height", "width", "count"), [(1, 40, 5), (40, 1, 5), (7, 9, 4), (33, 65, 12), (70, 130, 60), (2, 2, 4)]
)
def test_touching_instances(device: str, height: int, width: int, count: int) -> None:
    maps = np.stack([territories(height, width, count, seed, background) for seed, background in enumerate((0.4, 0.0))])
    labels = torch.from_numpy(maps).to(device)
    results = F.squared_distance(labels, instances=True), *F.distance_targets(labels, 1.5, instances=True)
    for image, *result in zip(maps, *(x.cpu() for x in results), strict=True):
        check(image, *result, radius=1.5)


@pytest.mark.parametrize("device", ["plain", "avx2", "avx512", "cuda"], indirect=True)
def test_distances_beyond_the_reach_of_the_search(device: str) -> None:
    """Another algorithm computes long distances. Two instances touch along a column, and a third is a dot far below."""
    labels = np.zeros((1, 560, 620), np.int32)
    labels[0, :290, :310], labels[0, :290, 310:] = 1, 2
    labels[0, 559, 20] = 3
    tensor = torch.from_numpy(labels).to(device)
    results = F.squared_distance(tensor, instances=True), *F.distance_targets(tensor, instances=True)
    check(labels[0], *(x[0].cpu() for x in results))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 40)),
    ids=st.sampled_from([(0, 1), (0, 1, 2), (1, 2, 3), (0, 255, 256), (-1, 0, 65536), (5,)]),
    seed=st.integers(0, 2**16),
)
def test_backends_agree_on_noise(shape: tuple[int, int, int], ids: tuple[int, ...], seed: int) -> None:
    maps = np.random.default_rng(seed).choice(np.array(ids, np.int32), shape)
    labels = torch.from_numpy(maps)
    expected = reference.squared_distance(labels, True)
    torch.testing.assert_close(portable.squared_distance(labels, True), expected, rtol=0, atol=0)
    results = F.squared_distance(labels, instances=True), *F.distance_targets(labels, instances=True)
    for image, *result in zip(maps, *results, strict=True):
        check(image, *result)


def test_equals_the_binary_targets_where_instances_do_not_touch(device: str) -> None:
    labels = torch.from_numpy(territories(90, 110, 8, seed=0))
    labels[reference.touching(labels[None])[0] != 0] = 0  # a background line between all of them
    apart = labels.clone()
    apart[1:, 1:][(labels[:-1, :-1] != labels[1:, 1:]) & (labels[:-1, :-1] != 0)] = 0
    apart[1:, :-1][(labels[:-1, 1:] != labels[1:, :-1]) & (labels[:-1, 1:] != 0)] = 0
    apart = apart.to(device)
    assert len(apart.unique()) > 3
    for with_ids, binary in zip(F.distance_targets(apart, instances=True), F.distance_targets(apart != 0), strict=True):
        assert torch.equal(with_ids, binary)


def test_one_instance_that_fills_the_image(device: str) -> None:
    labels = torch.full((1, 9, 7), 3, device=device)
    sdf, boundary = F.distance_targets(labels, instances=True)
    assert (sdf == 1).all()
    assert not boundary.any()
    assert (F.squared_distance(labels, instances=True) == -1).all()


def test_two_instances_without_background(device: str) -> None:
    labels = torch.tensor([[1, 1, 1, 2, 2]], device=device)
    sdf, boundary = F.distance_targets(labels, instances=True)
    assert boundary.tolist() == [[0, 0, 1, 1, 0]]
    torch.testing.assert_close(sdf.cpu(), torch.tensor([[1, 2 / 3, 0, 0, 2 / 3]]), rtol=0, atol=1e-6)


DTYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_type(device: str, dtype: type) -> None:
    """Ids use the highest and the lowest bits of the type."""
    few = territories(21, 40, 5, seed=1)
    high = np.iinfo(dtype).max // 8 + 1
    labels = few.astype(dtype)
    labels[few % 2 == 0] *= high
    expected = F.squared_distance(torch.from_numpy(few).to(device), instances=True).cpu()
    assert torch.equal(F.squared_distance(labels, instances=True), expected)
    assert torch.equal(F.squared_distance(torch.from_numpy(labels).to(device), instances=True).cpu(), expected)


def test_arrays_of_any_layout() -> None:
    labels = territories(12, 30, 6, seed=2)
    expected = F.squared_distance(labels, instances=True)
    read_only = labels.copy()
    read_only.flags.writeable = False
    strided = np.repeat(labels, 2, axis=1)[:, ::2]
    for other in (labels[::-1, ::-1].copy()[::-1, ::-1], np.asfortranarray(labels), labels.astype(">i4"), read_only):
        assert torch.equal(F.squared_distance(other, instances=True), expected)
    assert torch.equal(F.squared_distance(torch.from_numpy(strided), instances=True), expected)
    batch = torch.from_numpy(labels)[None, None]
    assert torch.equal(F.squared_distance(batch, instances=True), expected[None, None])


def test_bool_is_one_instance() -> None:
    mask = territories(12, 30, 6, seed=2) != 0
    assert torch.equal(F.squared_distance(mask, instances=True), F.squared_distance(mask))


def test_opcheck_and_full_graph() -> None:
    labels = torch.from_numpy(territories(9, 14, 4, seed=3))[None]
    torch.library.opcheck(torch.ops.semimoe_fast.squared_distance.default, (labels, True))
    torch.library.opcheck(torch.ops.semimoe_fast.distance_targets.default, (labels, 2.0, True))
    compiled = torch.compile(lambda x: F.distance_targets(x, instances=True), fullgraph=True, backend="aot_eager")
    for result, eager in zip(compiled(labels), F.distance_targets(labels, instances=True), strict=True):
        assert torch.equal(result, eager)


@pytest.mark.parametrize(
    "labels",
    [torch.ones(4, 4), np.ones((4, 4), np.float32), torch.ones(4, 4).cfloat()],
    ids=["torch", "numpy", "complex"],
)
def test_floating_point_ids_are_refused(labels: Tensor | np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"an instance map holds integers, got dtype .*: convert ids"):
        F.distance_targets(labels, instances=True)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_maps(device: str, shape: tuple[int, int, int]) -> None:
    labels = torch.zeros(shape, dtype=torch.int32, device=device)
    results = F.squared_distance(labels, instances=True), *F.distance_targets(labels, instances=True)
    assert all(result.shape == shape for result in results)


def test_instances_is_a_bool() -> None:
    with pytest.raises(TypeError, match="instances is 'no': give True or False"):
        F.distance_targets(np.ones((4, 4), int), instances="no")


@pytest.mark.parametrize("batch", [1, 2])
def test_threads_do_not_change_the_result(batch: int) -> None:
    """Threads share one image, or take an image each."""
    labels = torch.from_numpy(np.stack([territories(300, 400, 40, seed) for seed in range(batch)]))
    torch.set_num_threads(1)
    alone = F.distance_targets(labels, instances=True)
    torch.set_num_threads(3)
    for result, expected in zip(F.distance_targets(labels, instances=True), alone, strict=True):
        assert torch.equal(result, expected)
