"""Distances between the surfaces of binary masks: the 95th percentile and the average."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import functional as F
from .maps import array_pair


class SurfaceDistances(NamedTuple):
    """Distances of B images in pixels, float64 (B,) on the CPU; NaN where a mask is empty."""

    hd95: Tensor
    assd: Tensor


def surface_distances(prediction: Any, truth: Any) -> SurfaceDistances:
    """How far the surfaces of two masks are apart, for each image.

    prediction, truth: (B, H, W) or (H, W), which counts as B = 1, of bool or any integer dtype, tensors or objects that
    support DLPack; every non-zero value is foreground -> SurfaceDistances of B images.

    The surface of a mask is its pixels with a 4-neighbor in the background or outside of the image. From every pixel
    of either surface goes a distance to the nearest pixel of the other. hd95 is the 95th percentile of all of them
    (linear interpolation), assd the mean of the two directions' means.

    Raises TypeError for floating-point masks, ValueError for other shapes or shapes that differ.
    """
    distances = [_distances(*images) for images in zip(*array_pair(prediction, truth), strict=True)]
    return SurfaceDistances(*torch.tensor(distances, dtype=torch.float64).reshape(-1, 2).unbind(1))


def _distances(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """hd95 and assd of one image."""
    masks = np.stack([prediction != 0, truth != 0])
    if not masks.any((1, 2)).all():
        return float("nan"), float("nan")
    surfaces = _surfaces(_crop(masks))
    to_nearest = F.squared_distance(torch.from_numpy(surfaces)).flatten(1).numpy()  # of pixels outside a surface: to it
    surfaces = surfaces.reshape(2, -1)
    from_prediction, from_truth = (
        np.sqrt(np.where(other[pixels], 0, squared[pixels]))
        for pixels, other, squared in zip(map(np.flatnonzero, surfaces), surfaces[::-1], to_nearest[::-1], strict=True)
    )
    hd95 = np.percentile(np.concatenate([from_prediction, from_truth]), 95)
    return float(hd95), float(from_prediction.mean() + from_truth.mean()) / 2


def _crop(masks: np.ndarray) -> np.ndarray:
    """The smallest part of (2, H, W) that has all foreground."""
    rows, columns = (np.flatnonzero(masks.any((0, axis))) for axis in (2, 1))
    return masks[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _surfaces(masks: np.ndarray) -> np.ndarray:
    """masks bool (B, H, W) -> bool, the pixels with a 4-neighbor that is background or outside."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    vertical = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1]
    horizontal = padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return masks & ~(vertical & horizontal)
