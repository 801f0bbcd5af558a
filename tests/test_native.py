"""The compiled distance operations: on the CPU, the phases of the CUDA kernels on the CPU, and the kernels on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt

from semimoe_fast import _native, reference

SOURCES = Path(__file__).parents[1] / "csrc"
# Relative roundings of up to 2^-24 each: the two roots, half as much for each square above 2^24 before its root, the
# quotient, and the float64 reference's own rounding to float32. Values are at most 1.
SDF_TOLERANCE = 5 * 2.0**-24

# Runs both operations on a uint8 (B, H, W) array with a ring radius: squared distance, sdf, boundary.
Engine = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray, np.ndarray]]


INSTRUCTION_SETS = ["plain", "avx2", "avx512"]


def on_device(device: str, instruction_set: str | None = None) -> Engine:
    def run(mask: np.ndarray, ring_radius: float = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with pytest.MonkeyPatch.context() as patch:
            if instruction_set is not None:
                patch.setenv("SEMIMOE_SIMD", instruction_set)
            return run_here(mask, ring_radius)

    def run_here(mask: np.ndarray, ring_radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        masks = torch.from_numpy(mask).to(device)
        squared = torch.empty(masks.shape, dtype=torch.int32, device=device)
        sdf = torch.empty(masks.shape, dtype=torch.float32, device=device)
        boundary = torch.empty(masks.shape, dtype=torch.uint8, device=device)
        _native.squared_distance(masks, squared)
        _native.distance_targets(masks, sdf, boundary, ring_radius)
        return squared.cpu().numpy(), sdf.cpu().numpy(), boundary.cpu().numpy()

    return run


def cuda_phases_on_cpu(folder: Path) -> Engine:
    library = folder / "distance.so"
    source = Path(__file__).parent / "cuda_on_cpu" / "distance.cpp"
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library],
        check=True,
    )
    run_phases = ctypes.CDLL(str(library)).run_phases

    def address(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def run_in_order(mask: np.ndarray, ring_radius: float, backwards: bool) -> tuple[np.ndarray, ...]:
        gaps, squared, deepest, sdf, boundary = (
            np.full(shape, 77, dtype)  # neither a likely result nor a harmless one
            for shape, dtype in [
                (mask.shape, np.uint16),
                (mask.shape, np.int32),
                ((len(mask), 2), np.int32),
                (mask.shape, np.float32),
                (mask.shape, np.uint8),
            ]
        )
        batch, height, width = mask.shape
        run_phases(
            *(address(mask), ctypes.c_int64(batch), height, width, address(gaps), address(squared), address(deepest)),
            *(_native.squared_radius(ring_radius), address(sdf), address(boundary), ctypes.c_bool(backwards)),
        )
        return squared, sdf, boundary

    def run(mask: np.ndarray, ring_radius: float = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        forwards, backwards = (run_in_order(mask, ring_radius, order) for order in (False, True))
        for one, other in zip(forwards, backwards, strict=True):
            np.testing.assert_array_equal(one, other)
        return forwards

    return run


@pytest.fixture(scope="module", params=[*INSTRUCTION_SETS, "cuda phases on the cpu", "cuda"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    if request.param == "cuda phases on the cpu":
        if shutil.which("g++") is None:
            pytest.skip("g++ was not found")
        return cuda_phases_on_cpu(tmp_path_factory.mktemp("phases"))
    if request.param == "cuda":
        if _native.why_unavailable("cuda"):
            pytest.skip(_native.why_unavailable("cuda"))
        return on_device("cuda")
    if request.param not in _native.module().instruction_sets:
        pytest.skip(f"the CPU kernels for {request.param} do not run here")
    return on_device("cpu", request.param)


def scipy_squared_distance(mask: np.ndarray) -> np.ndarray:
    """SciPy's distances, whose squares are integers before the root, one image at a time."""

    def of_image(foreground: np.ndarray) -> np.ndarray:
        if foreground.all() or not foreground.any():
            return np.full(foreground.shape, -1)
        distance = distance_transform_edt(foreground) + distance_transform_edt(~foreground)
        return np.rint(distance**2)

    return np.stack([of_image(image != 0) for image in mask]).astype(np.int64)


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


@pytest.mark.parametrize("archive_name", ["targets", "targets_glas"])
def test_golden_targets(engine: Engine, golden: Callable[[str], dict[str, np.ndarray]], archive_name: str) -> None:
    archive = golden(archive_name)
    names = sorted({key.split("/")[0] for key in archive})
    assert names
    for name in names:
        mask = archive[f"{name}/mask"][None]
        squared, sdf, boundary = engine(mask, 2)
        np.testing.assert_array_equal(squared, scipy_squared_distance(mask), err_msg=name)
        np.testing.assert_array_equal(boundary[0], archive[f"{name}/boundary"], err_msg=name)
        # 1e-6: the published code rounds its float64 roots to float32, as exact as can be, and so do we up to 2 ulp.
        np.testing.assert_allclose(sdf[0], archive[f"{name}/sdf"], rtol=0, atol=1e-6, err_msg=name)


SMALL = hnp.array_shapes(min_dims=3, max_dims=3, max_side=24)


@settings(deadline=None)
@given(
    mask=hnp.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 1, 255])),
    ring_radius=st.sampled_from([0, 1, 2, 2.5, 7, 1e9]),
)
def test_random_masks(engine: Engine, mask: np.ndarray, ring_radius: float) -> None:
    check(engine, mask, ring_radius)


@pytest.mark.parametrize("shape", [(1, 1), (1, 97), (97, 1), (2, 3), (31, 33), (64, 64), (127, 129), (257, 255)])
@pytest.mark.parametrize("size", [1, 8, 40], ids=lambda size: f"blobs of {size}")
def test_shapes(engine: Engine, shape: tuple[int, int], size: int) -> None:
    check(engine, blobs(3, *shape, size=size))


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


@pytest.mark.parametrize("dots", [1, 3, 8])
@pytest.mark.parametrize("inverted", [False, True])
def test_distances_about_the_reach_of_the_search(engine: Engine, dots: int, inverted: bool) -> None:
    """The CPU kernels search up to 252 pixels, in 16-bit words, and leave what is farther to another algorithm."""
    random = np.random.default_rng(dots)
    mask = np.zeros((3, 530, 610), np.uint8)
    for image in mask:
        image.flat[random.choice(image.size, dots, replace=False)] = 1
    check(engine, 1 - mask if inverted else mask)


@pytest.mark.parametrize("radius", [251, 252, 253, 254])
def test_discs_about_the_reach_of_the_search(engine: Engine, radius: int) -> None:
    """The largest distance of the image, which scales all others, on either side of the reach."""
    y, x = np.indices((1, 520, 530))[1:]
    check(engine, ((y - 259) ** 2 + (x - 262) ** 2 <= radius**2).astype(np.uint8))


@pytest.mark.parametrize("shape", [(1, 46_340), (46_340, 1), (3, 20_000), (20_000, 3)])
@pytest.mark.parametrize("sites", [1, 20])
def test_long_images(shape: tuple[int, int], sites: int) -> None:
    """The largest distances that fit, and rows that an algorithm quadratic in the width would not finish."""
    mask = np.zeros((1, *shape), np.uint8)
    mask.flat[np.random.default_rng(0).choice(mask.size, sites, replace=False)] = 1
    mask.flat[0] = 1
    check(on_device("cpu"), mask)


@pytest.mark.parametrize("shape", [(0, 1, 46_341), (0, 46_341, 1), (0, 40_000, 40_000)])
def test_too_large_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]} pixels is too large"):
        on_device("cpu")(np.empty(shape, np.uint8), 2)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("shape", [(1, 600, 1100), (2, 300, 300), (7, 130, 128)])
def test_threads_do_not_change_the_result(shape: tuple[int, int, int]) -> None:
    """Strips of one image, images, and both at once; every count is compared with the verified single thread."""
    mask = blobs(*shape)
    torch.set_num_threads(1)
    check(on_device("cpu"), mask)
    expected = on_device("cpu")(mask)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for result, alone in zip(on_device("cpu")(mask), expected, strict=True):
            np.testing.assert_array_equal(result, alone)


def test_other_python_threads_run_meanwhile() -> None:
    """Python is told never to switch threads by itself, so the main one can only see `inside` if the call lets go.

    On a busy machine it may wake too late for that, hence several calls.
    """
    mask = torch.from_numpy(blobs(1, 2048, 2048))
    out = torch.empty(mask.shape, dtype=torch.int32)
    _native.squared_distance(mask, out)  # loads the module, which would let other threads run

    def seen_during_a_call() -> str:
        state = "before"
        entered = threading.Event()

        def work() -> None:
            nonlocal state
            state = "inside"
            entered.set()
            _native.squared_distance(mask, out)
            state = "after"

        worker = threading.Thread(target=work)
        worker.start()
        entered.wait()
        seen = state
        worker.join()
        return seen

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(seen_during_a_call() == "inside" for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def test_bool_and_uint8_masks_agree() -> None:
    mask = torch.from_numpy(blobs(2, 33, 65))
    outs = torch.empty((2, *mask.shape), dtype=torch.int32)
    _native.squared_distance(mask * 255, outs[0])
    _native.squared_distance(mask.bool(), outs[1])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("mask", "out"),
    [
        (torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.int32)),
        (torch.zeros(1, 4, 5, dtype=torch.int32), torch.zeros(1, 4, 5, dtype=torch.int32)),
        (torch.zeros(1, 5, 4, dtype=torch.uint8).mT, torch.zeros(1, 4, 5, dtype=torch.int32)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 5, dtype=torch.int64)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.int32)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 5, 4, dtype=torch.int32).mT),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 5, dtype=torch.int32, device="meta")),
    ],
    ids=["2-D mask", "int mask", "strided mask", "long out", "small out", "strided out", "out elsewhere"],
)
def test_tensors_the_native_code_cannot_take_are_refused(mask: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"(mask|out) is"):
        _native.squared_distance(mask, out)


@pytest.fixture
def reloaded() -> Iterator[None]:
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


@pytest.mark.usefixtures("reloaded")
def test_a_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_semimoe_fast", None)
    assert _native.module() is None
    assert "pip install ." in _native.why_missing()
    mask = torch.zeros(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="pip install"):
        _native.squared_distance(mask, mask.int())


@pytest.mark.usefixtures("reloaded")
def test_a_module_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "ABI", -1)
    assert _native.module() is None
    assert "ABI" in _native.why_missing()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("75 80", (8, 0), True),
        ("75 80", (8, 6), True),  # machine code of an older minor version
        ("86 90", (8, 0), False),  # of a newer one
        ("80 90", (7, 0), False),
        ("80 90", (7, 5), False),
        ("80 90", (12, 0), True),  # PTX of the last
        ("90 80", (9, 0), True),
        ("90 80", (10, 0), True),
        ("80 120", (10, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("100a", (10, 3), False),
    ],
)
def test_gpus_that_built_kernels_run_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(archs, capability) == runs


def test_a_gpu_the_kernels_were_not_built_for_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 0)][index])
    reason = _native._why_no_gpu.__wrapped__("80 90")
    assert "built for sm 80 90, not 70" in reason
    assert "with 70 in SEMIMOE_CUDA_ARCHS" in reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_cuda_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    compiled = subprocess.run(
        [*command, SOURCES / "distance.cu", "-o", tmp_path / "distance.cubin"], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    assert len(spills) == 3, compiled.stderr  # one line for each kernel
    assert set(spills) == {("0", "0", "0")}
