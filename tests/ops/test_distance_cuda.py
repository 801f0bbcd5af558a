"""What is special about the CUDA distance operations: instance maps, linear time, rounding, machine code."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulated_cuda import Results, cuda_library, cuda_on_cpu, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt

from semimoe_fast.ops import _native, reference

Engine = Callable[..., Results]  # of (labels, ring radius)
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
SDF_TOLERANCE = 5 * 2.0**-24  # as in test_distance.py


def on_gpu(labels: np.ndarray, ring_radius: float = 2, instances: bool = False) -> Results:
    native, masks = _native.module_for("cuda"), torch.from_numpy(labels).cuda()
    squared = torch.empty(masks.shape, dtype=torch.int32, device="cuda")
    sdf, boundary = torch.empty_like(squared, dtype=torch.float32), torch.empty_like(squared, dtype=torch.uint8)
    _native._distance_cuda(native, masks, instances, squared=squared)
    _native._distance_cuda(native, masks, instances, sdf, ring_radius, sdf, boundary)
    return squared.cpu().numpy(), sdf.cpu().numpy(), boundary.cpu().numpy()


ENGINES = {"cuda": None, "cuda on the cpu, sm_80": 8, "cuda on the cpu, sm_90": 9}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    capability = ENGINES[request.param]
    if capability is None:
        if _native.why_unavailable("cuda"):
            pytest.skip(_native.why_unavailable("cuda"))
        return on_gpu
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    return cuda_on_cpu(capability)


def check_instances(engine: Engine, labels: np.ndarray, ring_radius: float = 2) -> None:
    squared, sdf, boundary = engine(labels, ring_radius, instances=True)
    np.testing.assert_array_equal(squared, np.stack([squared_distance(image) for image in labels]))
    expected_sdf, ring = reference.targets_from_distance(
        torch.from_numpy(labels != 0), torch.from_numpy(squared), ring_radius
    )
    np.testing.assert_allclose(sdf, expected_sdf.numpy(), rtol=0, atol=SDF_TOLERANCE)
    np.testing.assert_array_equal(boundary, ring.numpy() | touching(labels))


def squared_distance(image: np.ndarray) -> np.ndarray:
    """Squared distance of every pixel to the nearest one of another label, one label at a time."""
    squared = np.full(image.shape, -1, np.int64)
    labels = np.unique(image)
    for label in labels if len(labels) > 1 else ():
        here = image == label
        squared[here] = np.rint(distance_transform_edt(here)[here] ** 2)
    return squared


def touching(labels: np.ndarray) -> np.ndarray:
    """Foreground with a 4-neighbor in another instance."""
    result = np.zeros(labels.shape, bool)
    for axis in (1, 2):
        one, other = (np.moveaxis(labels, axis, 0)[part] for part in (slice(1, None), slice(None, -1)))
        touch = (one != other) & (one != 0) & (other != 0)
        view = np.moveaxis(result, axis, 0)
        view[1:] |= touch
        view[:-1] |= touch
    return result


def tiled(height: int, width: int, size: int, seed: int = 0) -> np.ndarray:
    """Two maps of random squares with labels from 0 to 3."""
    squares = np.random.default_rng(seed).integers(0, 4, (2, height // size + 1, width // size + 1))
    return squares.repeat(size, 1).repeat(size, 2)[:, :height, :width]


@settings(deadline=None, max_examples=20)
@given(
    labels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=20), elements=st.integers(0, 3)),
    ring_radius=st.sampled_from([0, 1, 2, 7]),
)
def test_random_instances(engine: Engine, labels: np.ndarray, ring_radius: float) -> None:
    check_instances(engine, labels, ring_radius)


@pytest.mark.parametrize("shape", [(1, 1), (1, 97), (97, 1), (33, 64), (100, 256), (70, 300), (290, 37)])
@pytest.mark.parametrize("size", [1, 9, 40])
def test_instances_of_many_shapes(engine: Engine, shape: tuple[int, int], size: int) -> None:
    check_instances(engine, tiled(*shape, size))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64])
def test_instances_of_every_integer_type(engine: Engine, dtype: type) -> None:
    """Labels that differ only in the highest bits."""
    check_instances(engine, tiled(40, 70, 6).astype(dtype) * dtype(np.iinfo(dtype).max // 4 + 1))


@pytest.mark.parametrize("label", [0, 1, 200])
def test_one_label_fills_the_image(engine: Engine, label: int) -> None:
    squared, sdf, boundary = engine(np.full((1, 40, 300), label, np.uint8), 2, instances=True)
    assert (squared == -1).all()
    assert (sdf == (1 if label else -1)).all()
    assert (boundary == 0).all()


@pytest.mark.parametrize("shape", [(230, 256), (230, 300)])
def test_far_instances_without_background(engine: Engine, shape: tuple[int, int]) -> None:
    halves, dot = np.ones((2, 1, *shape), np.uint8)
    halves[..., 30:] = dot[0, 3, 5] = 2
    check_instances(engine, np.concatenate([halves, dot]))


@pytest.mark.parametrize("shape", [(128, 255), (100, 300)])
def test_instances_apart_equal_their_mask_bit_for_bit(engine: Engine, shape: tuple[int, int]) -> None:
    labels = np.zeros((1, *shape), np.int32)
    for label in range(1, 9):
        labels[0, 11 * label : 11 * label + 9, 20 * label : 20 * label + 15] = label
    for result, expected in zip(engine(labels, 2, instances=True), engine(labels, 2), strict=True):
        np.testing.assert_array_equal(result, expected)


def extreme_masks(size: int) -> dict[str, np.ndarray]:
    """Masks whose distances are long, or whose minimizing columns jump."""
    y, x = np.indices((size, size))
    middle, corner = size // 2, size - 1
    return {
        "dot": (y == size // 3) & (x == size // 5),
        "two corners": (y == 0) & ((x == 0) | (x == corner)),
        "half plane": x < middle,
        "upper half": y < middle,
        "diagonal": x == y,
        "disc": (y - middle) ** 2 + (x - middle) ** 2 < (size * 3 // 8) ** 2,
        "noise": np.random.default_rng(0).random((size, size)) < 0.3,
        "sparse": np.random.default_rng(0).random((size, size)) < 1e-5,
    }


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("capability", "size"),
    [(9, 256), (8, 600), pytest.param(8, 1024, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", extreme_masks(1))
def test_time_is_linear_in_the_pixels(capability: int, size: int, name: str) -> None:
    """At most 64 trips of inner loops a pixel: 33 columns visited, the levels of the bisection, the search nearby."""
    mask = extreme_masks(size)[name].astype(np.uint8)[None]
    cuda_library().take_iterations()
    (squared,) = launch(mask, capability)
    assert cuda_library().take_iterations() <= 64 * mask.size
    np.testing.assert_array_equal(squared[0], squared_distance(mask[0]))


@NEEDS_COMPILER
def test_roots_are_correctly_rounded() -> None:
    """Of all integers below 2^21, for every estimate of the hardware."""
    for power in range(21):
        assert cuda_library().wrong_root(2.0**power, 2.0 ** (power + 1), 2 ** (23 - power)) == 0


@NEEDS_COMPILER
@pytest.mark.parametrize("side", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_quotients_are_correctly_rounded(side: int) -> None:
    """Of all pairs of distances in an image; 256 is the largest side of the cluster path."""
    assert cuda_library().wrong_ratios(side) == 0
    assert cuda_library().wrong_random_ratios(1_000_000, side) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_failure_restores_the_stream_capture_mode() -> None:
    assert cuda_library().capture_mode_after_failure() == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_gpu_without_room_for_a_cluster_takes_the_general_path() -> None:
    mask = (np.random.default_rng(0).random((2, 60, 70)) < 0.1).astype(np.uint8)
    for small, large in zip(cuda_on_cpu(12)(mask), cuda_on_cpu(9)(mask), strict=True):
        np.testing.assert_array_equal(small, large)
