"""Distance targets against other libraries: time per pixel by size of the masks, for the worst masks, and by threads.

    make bench ARGS="-k test_distance --benchmark-json=targets.json"

Every provider computes the normalized signed distance and the ring of uint8 masks, on one CPU thread or on a GPU; peers
without batches take one image at a time. The results are checked against ours before the timing. A peer that is not
installed is skipped. On the CPU the masks may be in the caches, as after a loader has decoded them. On a GPU several
copies, which together exceed the L2 cache, take turns.

In `extra_info`, share_of_floor is the time of a plain copy of 6 bytes per pixel (read 1 of mask, write 4 of sdf and 1
of ring), divided by the measured time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from skimage.morphology import dilation, disk
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.utils.benchmark import Timer

from semimoe_fast import functional as F
from semimoe_fast.data.glands import glands
from semimoe_fast.ops import _native

from .conftest import clock, copies_beyond_cache

Array = Any  # an array of NumPy, CuPy or torch
Targets = tuple[Array, Array]
Distance = Callable[[Array], Array]  # one image -> distance of every pixel to the nearest zero
Run = Callable[[], Targets]

# ------------------------------------------------------------------------------------------------------------- peers


def each_image(targets: Callable[[Array], Targets], masks: Array) -> Run:
    return lambda: tuple(map(np.stack, zip(*map(targets, masks), strict=True)))


def from_distance(distance: Distance, masks: Array) -> Run:
    """Targets from a peer's distance function, the ring too."""

    def targets(mask: Array) -> Targets:
        inside, outside = distance(mask), distance(1 - mask)
        sdf = inside / inside.max() - outside / outside.max()
        sdf[inside == 1] = 0
        return sdf, ((outside > 0) & (outside <= 2)).astype(np.uint8)

    return each_image(targets, masks)


def scipy_skimage(masks: Tensor) -> Run:
    """The method of the published trainer's loader."""

    def targets(mask: np.ndarray) -> Targets:
        inside, outside = distance_transform_edt(mask), distance_transform_edt(1 - mask)
        sdf = inside / inside.max() - outside / outside.max()
        sdf[find_boundaries(mask, mode="inner") & (mask != 0)] = 0
        return sdf, dilation(mask, disk(2)) - mask

    return each_image(targets, masks.numpy())


def edt(masks: Tensor) -> Run:
    library = pytest.importorskip("edt")
    return from_distance(lambda mask: library.edt(mask, parallel=1), masks.numpy())


def opencv_distance() -> Distance:
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(1)
    return lambda mask: cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def opencv(masks: Tensor) -> Run:
    return from_distance(opencv_distance(), masks.numpy())


def opencv_only_distances(masks: Tensor) -> Run:
    distance = opencv_distance()
    return each_image(lambda mask: (distance(mask), distance(1 - mask)), masks.numpy())


def meijster(mask: np.ndarray) -> np.ndarray:
    """Distance to the nearest zero, in integers: first along the columns, then by the lower envelope of each row."""
    height, width = mask.shape
    gaps = np.empty((height, width), np.int32)
    for x in range(width):
        gaps[0, x] = height + width if mask[0, x] else 0
    for y in range(1, height):
        for x in range(width):
            gaps[y, x] = gaps[y - 1, x] + 1 if mask[y, x] else 0
    for y in range(height - 2, -1, -1):
        for x in range(width):
            gaps[y, x] = min(gaps[y, x], gaps[y + 1, x] + 1)

    distance = np.empty((height, width), np.float32)
    site = np.empty(width, np.int32)  # column of each parabola of the envelope
    start = np.empty(width, np.int32)  # first column where it is the lowest
    for y in range(height):
        gap = gaps[y]
        top = -1
        for x in range(width):
            first = 0
            while top >= 0:
                s = site[top]
                first = 1 + (x * x - s * s + gap[x] ** 2 - gap[s] ** 2) // (2 * (x - s))
                if first > start[top]:
                    break
                top -= 1
                first = 0
            if first < width:
                top += 1
                site[top], start[top] = x, first
        for x in range(width - 1, -1, -1):
            distance[y, x] = np.sqrt((x - site[top]) ** 2 + gap[site[top]] ** 2)
            if x == start[top]:
                top -= 1
    return distance


@functools.cache
def compiled_meijster() -> Distance:
    return pytest.importorskip("numba").njit(meijster)


def numba(masks: Tensor) -> Run:
    return from_distance(compiled_meijster(), masks.numpy())


def cupy(masks: Tensor) -> Run:
    library = pytest.importorskip("cupyx.scipy.ndimage")
    return from_distance(lambda mask: library.distance_transform_edt(mask, float64_distances=False), cupy_masks(masks))


def cucim(masks: Tensor) -> Run:
    library = pytest.importorskip("cucim.core.operations.morphology")
    return from_distance(library.distance_transform_edt, cupy_masks(masks))


def monai(masks: Tensor) -> Run:
    pytest.importorskip("cucim.core.operations.morphology")  # without it MONAI computes with SciPy
    library = pytest.importorskip("monai.transforms.utils")
    from_dlpack = pytest.importorskip("cupy").from_dlpack

    def distance(mask: Array) -> Array:
        channels = torch.from_dlpack(mask)[None]
        return from_dlpack(library.distance_transform_edt(channels)[0])

    return from_distance(distance, cupy_masks(masks))


def cupy_masks(masks: Tensor) -> Array:
    return pytest.importorskip("cupy").from_dlpack(masks.cuda())


# -------------------------------------------------------------------------------------------------------------- ours


def ours(masks: Tensor) -> Run:
    return lambda: F.distance_targets(masks)


def ours_on_cuda(masks: Tensor) -> Run:
    return ours(masks.cuda())


def ours_in_a_cuda_graph(masks: Tensor) -> Run:
    on_cuda = ours_on_cuda(masks)
    on_cuda()  # loads the kernels, which is not allowed during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        targets = on_cuda()

    def run() -> Targets:
        graph.replay()
        return targets

    return run


INSTRUCTION_SETS = {f"ours, {name}": name for name in _native.module().instruction_sets}
OURS = {
    **dict.fromkeys(INSTRUCTION_SETS, ours),
    "ours, cuda": ours_on_cuda,
    "ours, cuda graph": ours_in_a_cuda_graph,
}
PEERS = {
    "scipy + scikit-image": scipy_skimage,
    "edt": edt,
    "opencv": opencv,
    "numba": numba,
    "cupy": cupy,
    "cucim": cucim,
    "monai": monai,
}
ALONE = {"opencv, distances alone": opencv_only_distances}
PROVIDERS = {**OURS, **PEERS, **ALONE}
ON_CUDA = ("ours, cuda", "ours, cuda graph", "cupy", "cucim", "monai")

# ------------------------------------------------------------------------------------------------------------- clock


pytestmark = [
    pytest.mark.benchmark(timer=clock, min_time=2e-3),  # enough calls per round to make the wait negligible
    pytest.mark.usefixtures("one_thread"),
]


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy that exceeds the caches; on the CPU with one thread."""
    source = torch.randint(256, (2**28,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # NumPy's copy is a memcpy, which bypasses the CPU's caches for large arrays; PyTorch's copy does not.
    copy = "target.copy_(source)" if device == "cuda" else "np.copyto(target.numpy(), source.numpy())"
    timer = Timer(copy, globals={"np": np, "source": source, "target": target})
    return 2 * source.numel() / timer.blocked_autorange(min_run_time=1).median


@pytest.fixture
def measure(benchmark, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Tensor], None]:
    """Check a provider on masks and time it."""

    def run(provider: str, masks: Tensor) -> None:
        device = "cuda" if provider in ON_CUDA else "cpu"
        if device == "cuda" and _native.why_unavailable("cuda"):
            pytest.skip(_native.why_unavailable("cuda"))
        expected = F.distance_targets(masks)
        if provider in INSTRUCTION_SETS:
            monkeypatch.setenv("SEMIMOE_SIMD", INSTRUCTION_SETS[provider])
        copies = copies_beyond_cache(masks.nbytes, torch.device(device))
        runs = itertools.cycle([PROVIDERS[provider](masks) for _ in range(copies)])  # each has its own copy

        def targets() -> Targets:
            return next(runs)()

        sdf, boundary = (torch.from_dlpack(array).cpu() for array in targets())
        if provider not in ALONE:
            torch.testing.assert_close(sdf.float(), expected[0], rtol=0, atol=1e-5)  # most peers compute in float32
            torch.testing.assert_close(boundary, expected[1], rtol=0, atol=0)
        benchmark(targets)
        if benchmark.enabled:
            seconds = benchmark.stats["median"] / masks.numel()
            benchmark.extra_info.update(
                device=device,
                pixels=masks.numel(),
                ns_per_pixel=1e9 * seconds,
                share_of_floor=6 / copy_bandwidth(device) / seconds,
            )

    return run


# ------------------------------------------------------------------------------------------------------------- masks


@functools.cache
def gland_masks(batch: int, side: int) -> Tensor:
    """uint8 (batch, side, side): the same glands at every side, scaled; four images repeat, because drawing is slow."""
    if batch > 4:
        return gland_masks(4, side).repeat(batch // 4, 1, 1)
    return glands(batch, side, seed=0)[1]


SIDE = 2048
WORST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # from y (SIDE, 1) and x (1, SIDE)
    "noise": lambda y, x: torch.rand((y + x).shape, generator=torch.Generator().manual_seed(0)) < 0.5,
    "one dot": lambda y, x: (y == 0) & (x == 0),  # in a corner, for the largest distances
    "upper half": lambda y, x: (y < SIDE // 2) & (x >= 0),
    "left half": lambda y, x: (y >= 0) & (x < SIDE // 2),
    "diagonal": lambda y, x: y == x,
    "checkerboard": lambda y, x: (y + x) % 2 == 1,
    "constant": lambda y, x: (y >= 0) & (x >= 0),
    "disc": lambda y, x: (y - SIDE // 2) ** 2 + (x - SIDE // 2) ** 2 <= 1000**2,
}


def worst_mask(name: str) -> Tensor:
    axis = torch.arange(SIDE)
    return WORST[name](axis[:, None], axis[None, :]).to(torch.uint8)[None]


# -------------------------------------------------------------------------------------------------------- benchmarks

# 64 masks of 2048 x 2048 need gigabytes. Peers take one image at a time, so larger batches would tell nothing new.
MOST_PIXELS, MOST_PEER_PIXELS = 64 * 1024**2, 8 * 1024**2


@pytest.mark.parametrize(
    ("batch", "side", "provider"),
    [
        (batch, side, provider)
        for side in (256, 1024, 2048)
        for batch in (1, 8, 64)
        for provider in (*OURS, *PEERS)
        if batch * side**2 <= (MOST_PIXELS if provider in OURS else MOST_PEER_PIXELS)
    ],
)
def test_glands(benchmark, measure, batch: int, side: int, provider: str) -> None:
    benchmark.group = f"distance targets, glands, {batch} x {side} x {side}"
    measure(provider, gland_masks(batch, side))


# A constant image has no distances, and peers would divide by 0: only OpenCV's distance transforms are timed there.
@pytest.mark.parametrize(
    ("mask", "provider"),
    [
        (mask, provider)
        for mask in WORST
        for provider in (*OURS, "opencv, distances alone" if mask == "constant" else "opencv")
    ],
)
def test_worst_masks(benchmark, measure, mask: str, provider: str) -> None:
    benchmark.group = f"distance targets, worst masks of {SIDE} x {SIDE}, {mask}"
    measure(provider, worst_mask(mask))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "side"), [(8, 256), (64, 256), (1, 1024), (1, 2048)])
def test_threads(benchmark, measure, batch: int, side: int, threads: int) -> None:
    benchmark.group = f"distance targets, threads, {batch} x {side} x {side}"
    torch.set_num_threads(threads)
    measure(next(iter(OURS)), gland_masks(batch, side))
