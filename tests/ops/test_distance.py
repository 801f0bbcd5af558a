"""The distance operations of the compiled module: on the CPU, on a GPU, and the CUDA code emulated on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulated_cuda import cuda_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt

from semimoe_fast.ops import _native, reference

# Relative rounding errors, up to 2^-24 each: two roots, the quotient, the reference's rounding to float32. A conversion
# of a square above 2^24 to float32 adds half as much, twice. Values are at most 1.
SDF_TOLERANCE = 5 * 2.0**-24

# Runs both operations on a uint8 (B, H, W) array with a ring radius: squared distance, sdf, boundary.
Engine = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray, np.ndarray]]


INSTRUCTION_SETS = ["plain", "avx2", "avx512"]


def on_device(device: str, instruction_set: str | None = None) -> Engine:
    def run(mask: np.ndarray, ring_radius: float = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with pytest.MonkeyPatch.context() as patch:
            if instruction_set is not None:
                patch.setenv("SEMIMOE_SIMD", instruction_set)
            return run_both(mask, ring_radius)

    def run_both(mask: np.ndarray, ring_radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        masks = torch.from_numpy(mask).to(device)
        squared = torch.empty(masks.shape, dtype=torch.int32, device=device)
        sdf = torch.empty(masks.shape, dtype=torch.float32, device=device)
        boundary = torch.empty(masks.shape, dtype=torch.uint8, device=device)
        _native.squared_distance(masks, False, squared)
        _native.distance_targets(masks, False, sdf, boundary, ring_radius)
        return squared.cpu().numpy(), sdf.cpu().numpy(), boundary.cpu().numpy()

    return run


CUDA_ON_CPU = {"cuda on the cpu, sm_80": 8, "cuda on the cpu, sm_90": 9}
QUICK = [*INSTRUCTION_SETS, "cuda"]  # engines that are fast enough for many or large masks


@pytest.fixture(scope="module", params=[*QUICK, *CUDA_ON_CPU])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param in CUDA_ON_CPU:
        if shutil.which("g++") is None:
            pytest.skip("g++ was not found")
        return cuda_on_cpu(CUDA_ON_CPU[request.param])
    if request.param == "cuda":
        if _native.why_unavailable("cuda"):
            pytest.skip(_native.why_unavailable("cuda"))
        return on_device("cuda")
    if request.param not in _native.module().instruction_sets:
        pytest.skip(f"the CPU kernels for {request.param} do not run here")
    return on_device("cpu", request.param)


def scipy_squared_distance(mask: np.ndarray) -> np.ndarray:
    """Squared distances (B, H, W) int64 by SciPy, -1 in constant images."""

    def of_one_image(foreground: np.ndarray) -> np.ndarray:
        if foreground.all() or not foreground.any():
            return np.full(foreground.shape, -1)
        distance = distance_transform_edt(foreground) + distance_transform_edt(~foreground)
        return np.rint(distance**2)

    return np.stack([of_one_image(image != 0) for image in mask]).astype(np.int64)


def check(engine: Engine, mask: np.ndarray, ring_radius: float = 2) -> None:
    squared, sdf, boundary = engine(mask, ring_radius)
    np.testing.assert_array_equal(squared, scipy_squared_distance(mask))
    expected_sdf, expected_boundary = reference.targets_from_distance(
        torch.from_numpy(mask != 0), torch.from_numpy(squared), ring_radius
    )
    np.testing.assert_allclose(sdf, expected_sdf.numpy(), rtol=0, atol=SDF_TOLERANCE)
    np.testing.assert_array_equal(boundary, expected_boundary.numpy())


def blobs(*shape: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """Random masks of blobs about `size` pixels wide."""
    batch, height, width = shape
    noise = torch.randn(batch, 1, height // size + 2, width // size + 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    return (smooth[:, 0] > 0.2).to(torch.uint8).numpy()


def only(*engines: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", engines, indirect=True)


@pytest.mark.parametrize(
    ("engine", "archive_name"),
    [
        *((engine, archive) for engine in QUICK for archive in ("targets", "targets_glas")),
        *((engine, "targets") for engine in CUDA_ON_CPU),
    ],
    indirect=["engine"],
)
def test_golden_targets(engine: Engine, golden: Callable[[str], dict[str, np.ndarray]], archive_name: str) -> None:
    archive = golden(archive_name)
    names = sorted({key.split("/")[0] for key in archive})
    assert names
    for name in names:
        mask = archive[f"{name}/mask"][None]
        squared, sdf, boundary = engine(mask, 2)
        np.testing.assert_array_equal(squared, scipy_squared_distance(mask), err_msg=name)
        np.testing.assert_array_equal(boundary[0], archive[f"{name}/boundary"], err_msg=name)
        # 1e-6: the published code rounds float64 values to float32; ours differ by at most 2 ulp.
        np.testing.assert_allclose(sdf[0], archive[f"{name}/sdf"], rtol=0, atol=1e-6, err_msg=name)


SMALL = hnp.array_shapes(min_dims=3, max_dims=3, max_side=24)


@settings(deadline=None, max_examples=30)
@given(
    mask=hnp.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 1, 255])),
    ring_radius=st.sampled_from([0, 1, 2, 2.5, 7, 1e9]),
)
def test_random_masks(engine: Engine, mask: np.ndarray, ring_radius: float) -> None:
    check(engine, mask, ring_radius)


@pytest.mark.parametrize("shape", [(1, 1), (1, 97), (97, 1), (2, 3), (31, 33), (64, 64), (127, 129), (257, 255)])
def test_shapes(engine: Engine, shape: tuple[int, int]) -> None:
    check(engine, np.concatenate([blobs(1, *shape, size=size) for size in (1, 8, 40)]))


@only("cuda", *CUDA_ON_CPU)
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint16, np.int32, np.int64])
def test_gpu_reads_every_integer_type(engine: Engine, dtype: type) -> None:
    """Instance ids, some of which have zeros in their low bits."""
    mask = blobs(2, 40, 70).astype(dtype)
    if dtype is not np.bool_:
        mask[:, ::2] *= np.iinfo(dtype).max // 2 + 1
    check(engine, mask)


@pytest.mark.parametrize(("value", "sdf_value"), [(0, -1), (1, 1), (255, 1)])
def test_constant_masks(engine: Engine, value: int, sdf_value: int) -> None:
    squared, sdf, boundary = engine(np.full((2, 5, 7), value, np.uint8), 2)
    assert (squared == -1).all()
    assert (sdf == sdf_value).all()
    assert (boundary == 0).all()


def test_constant_and_mixed_images_in_one_batch(engine: Engine) -> None:
    mixed = blobs(1, 20, 30)
    check(engine, np.concatenate([np.zeros_like(mixed), mixed, np.ones_like(mixed)]))


def test_foreground_without_an_interior_is_zero(engine: Engine) -> None:
    mask = np.zeros((1, 9, 9), np.uint8)
    mask[0, 4, :] = 1
    _, sdf, _ = engine(mask, 2)
    assert (sdf[mask == 1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    squared, sdf, boundary = on_device("cpu")(np.zeros(shape, np.uint8), 2)
    assert squared.shape == sdf.shape == boundary.shape == shape


@only(*QUICK)
@pytest.mark.parametrize("shape", [(256, 256), (217, 251), (40, 256), (256, 1), (1, 256), (330, 610)])
@pytest.mark.parametrize("dots", [1, 5])
@pytest.mark.parametrize("inverted", [False, True])
def test_distances_near_the_reach_of_the_search(
    engine: Engine, shape: tuple[int, int], dots: int, inverted: bool
) -> None:
    """The search reaches 252 pixels on the CPU and 176 on a GPU; another algorithm computes longer distances."""
    check(engine, dotted(shape, dots, inverted))


@only("cuda on the cpu, sm_90")
@pytest.mark.parametrize(
    ("shape", "dots", "inverted"),
    [((217, 251), 1, False), ((256, 256), 5, True), ((1, 256), 1, True), ((256, 1), 1, False), ((330, 256), 1, False)],
)
def test_distances_near_the_reach_on_an_emulated_gpu(
    engine: Engine, shape: tuple[int, int], dots: int, inverted: bool
) -> None:
    """The last shape is too high for a cluster and takes the general path."""
    check(engine, dotted(shape, dots, inverted))


def dotted(shape: tuple[int, int], dots: int, inverted: bool) -> np.ndarray:
    """A mask with a few foreground pixels in its first quarter; inverted: a few background pixels."""
    mask = np.zeros((1, *shape), np.uint8)
    mask.flat[np.random.default_rng(dots).choice(-(-mask.size // 4), dots, replace=False)] = 1
    return 1 - mask if inverted else mask


@only(*QUICK)
@pytest.mark.parametrize("radius", [175, 176, 177, 251, 252, 253])
def test_discs_near_the_reach_of_the_search(engine: Engine, radius: int) -> None:
    """The largest distance of the image, which scales all others, is below, at or above the reach."""
    check(engine, disc(radius, 520, 530))


@only("cuda on the cpu, sm_80")
def test_discs_near_the_reach_on_an_emulated_gpu(engine: Engine) -> None:
    """Half discs, which have the same largest distance as whole ones."""
    check(engine, np.concatenate([disc(radius, 190, 380)[:, :, 185:] for radius in (176, 177)]))


def disc(radius: int, height: int, width: int) -> np.ndarray:
    y, x = np.indices((1, height, width))[1:]
    return ((y - height // 2) ** 2 + (x - width // 2) ** 2 <= radius**2).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 46_340), (46_340, 1), (3, 20_000), (20_000, 3)])
@pytest.mark.parametrize("sites", [1, 20])
def test_long_images(shape: tuple[int, int], sites: int) -> None:
    """The largest distances that are allowed, and rows that take too long with an algorithm quadratic in the width."""
    mask = np.zeros((1, *shape), np.uint8)
    mask.flat[np.random.default_rng(0).choice(mask.size, sites, replace=False)] = 1
    mask.flat[0] = 1
    check(on_device("cpu"), mask)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[1:])
def test_instruction_sets_are_bitwise_equal(instruction_set: str) -> None:
    """Also quotients, which some sets compute without a division; the masks have 157,642 different ones."""
    if instruction_set not in _native.module().instruction_sets:
        pytest.skip(f"the CPU kernels for {instruction_set} do not run here")
    sizes = [(size, seed) for size in (5, 9, 20, 50, 140) for seed in range(12)]
    masks = np.concatenate([blobs(1, 300, 410, seed=seed, size=size) for size, seed in sizes])
    for result, plain in zip(on_device("cpu", instruction_set)(masks), on_device("cpu", "plain")(masks), strict=True):
        np.testing.assert_array_equal(result, plain)


@pytest.mark.parametrize("shape", [(1, 600, 1100), (2, 300, 300), (7, 130, 128)])
def test_threads_do_not_change_the_result(shape: tuple[int, int, int]) -> None:
    """Threads share an image, or take an image each. One thread is checked against SciPy, more threads against one."""
    mask = blobs(*shape)
    torch.set_num_threads(1)
    check(on_device("cpu"), mask)
    expected = on_device("cpu")(mask)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for result, alone in zip(on_device("cpu")(mask), expected, strict=True):
            np.testing.assert_array_equal(result, alone)
