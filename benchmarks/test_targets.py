"""Distance targets beside what others would use, on one batch of blobs the size of glands.

Peers: SciPy with scikit-image (as the published trainer's loader does), edt, OpenCV's exact mode. Each turns a uint8
mask into the normalised signed distance and the ring, one image at a time where the peer knows no batches, and is
checked against ours before it is timed. A peer that is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from skimage.morphology import dilation, disk
from skimage.segmentation import find_boundaries

from semimoe_fast import functional as F

Targets = tuple[np.ndarray, np.ndarray]


def normalized(mask: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    sdf = inside / inside.max() - outside / outside.max()
    sdf[find_boundaries(mask, mode="inner") & (mask != 0)] = 0
    return sdf


def scipy_skimage(mask: np.ndarray) -> Targets:
    sdf = normalized(mask, distance_transform_edt(mask), distance_transform_edt(1 - mask))
    return sdf, dilation(mask, disk(2)) - mask


def from_distances(distance: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], Targets]:
    """Targets from a peer's distance to the nearest zero; the ring needs no morphology then."""

    def targets(mask: np.ndarray) -> Targets:
        inside, outside = distance(mask), distance(1 - mask)
        sdf = inside / inside.max() - outside / outside.max()
        sdf[inside == 1] = 0
        return sdf, ((outside > 0) & (outside <= 2)).astype(np.uint8)

    return targets


def each_image(targets: Callable[[np.ndarray], Targets]) -> Callable[[np.ndarray], Targets]:
    def run(masks: np.ndarray) -> Targets:
        sdf, boundary = zip(*map(targets, masks), strict=True)
        return np.stack(sdf), np.stack(boundary)

    return run


def edt() -> Callable[[np.ndarray], Targets]:
    library = pytest.importorskip("edt")
    return from_distances(lambda mask: library.edt(mask, parallel=torch.get_num_threads()))


def opencv() -> Callable[[np.ndarray], Targets]:
    cv2 = pytest.importorskip("cv2")
    return from_distances(lambda mask: cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE))


PEERS = {"scipy + skimage": lambda: scipy_skimage, "edt": edt, "opencv": opencv}


def ours(device: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def run(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = F.distance_targets(masks)
        if device == "cuda":
            torch.cuda.synchronize()
        return targets

    return run


def blobs(batch: int, side: int) -> torch.Tensor:
    noise = torch.randn(batch, 1, side // 32, side // 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic")
    return (smooth[:, 0] > 0.2).to(torch.uint8)


@pytest.mark.parametrize(("batch", "side"), [(8, 256), (1, 1024)])
@pytest.mark.parametrize("name", ["ours, cpu", "ours, cuda", *PEERS])
def test_distance_targets(benchmark, name: str, batch: int, side: int) -> None:
    benchmark.group = f"distance targets, {batch} x {side} x {side}"
    masks = blobs(batch, side)
    if name.startswith("ours"):
        device = name.split(", ")[1]
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("PyTorch finds no CUDA device")
        benchmark(ours(device), masks.to(device))
        return
    peer = each_image(PEERS[name]())
    expected_sdf, expected_boundary = F.distance_targets(masks)
    sdf, boundary = peer(masks.numpy())
    np.testing.assert_allclose(sdf, expected_sdf.numpy(), atol=1e-5)  # peers in float32
    np.testing.assert_array_equal(boundary, expected_boundary.numpy())
    benchmark(peer, masks.numpy())
