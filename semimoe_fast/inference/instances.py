"""Split a predicted mask into instances with its signed distance field, by a watershed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage

from .. import functional as F
from ..errors import UserError

EIGHT = np.ones((3, 3), bool)  # pixels that touch at an edge or a corner are neighbors


def instances_of(mask: Any, sdf: Any, seed_level: float = 0.3, least_area: int = 100) -> np.ndarray:
    """Instances of one image: the 8-connected components of a mask, split where its signed distance field has a valley.

    mask: (H, W), non-zero is foreground. sdf: floating-point (H, W), positive inside the glands, in any unit.
    -> int32 (H, W): 0 is background, instances are numbered from 1 in the order of their first pixels, row by row.

    The seeds of a component are the 8-connected regions of its pixels with sdf > seed_level * m, where m is the largest
    sdf in the component; a watershed on -sdf grows them over the component. A component with m <= 0 has no seed and is
    one instance. Then instances of fewer than `least_area` pixels become background.

    seed_level: from 0 to below 1. Raises ValueError for other levels, for other shapes and for NaN or inf inside
    the mask, and UserError if scikit-image is not installed.
    """
    segmentation = skimage().segmentation
    mask, sdf = np.asarray(mask) != 0, np.asarray(sdf)
    if mask.ndim != 2 or mask.shape != sdf.shape:
        raise ValueError(f"mask and sdf are (H, W) of one image, got shapes {mask.shape} and {sdf.shape}")
    if not 0 <= seed_level < 1:
        raise ValueError(f"seed_level is {seed_level}: give a number from 0 to below 1")
    if sdf.dtype.kind != "f":
        sdf = sdf.astype(np.float64)  # the watershed negates it, which unsigned integers do not survive
    if not np.isfinite(sdf[mask]).all():
        raise ValueError("sdf has NaN or inf inside the mask: give finite numbers")

    components, count = ndimage.label(mask, EIGHT)
    largest = np.zeros(count + 1)  # positive sdf of each component, 0 where there is none
    np.maximum.at(largest, components[mask], sdf[mask])
    seeds, seed_count = ndimage.label(mask & (sdf > seed_level * largest[components]), EIGHT)
    seedless = mask & (largest[components] == 0)
    seeds[seedless] = seed_count + components[seedless]
    return renumber(segmentation.watershed(-sdf, seeds, connectivity=2, mask=mask), least_area)


def renumber(labels: np.ndarray, least_area: int) -> np.ndarray:
    """Drop labels of fewer than least_area pixels, and number the others in the order of their first pixels."""
    ids, first, area = np.unique(labels, return_index=True, return_counts=True)
    kept = np.flatnonzero((ids > 0) & (area >= least_area))
    numbers = np.zeros(labels.max(initial=0) + 1, np.int32)
    numbers[ids[kept[first[kept].argsort()]]] = np.arange(1, len(kept) + 1)
    return numbers[labels]


def depth(mask: np.ndarray, name: Path | str = "the image") -> np.ndarray:
    """Distance of the foreground of a mask (H, W) to the background, float32, in pixels; 0 where there is none.

    Raises UserError, with the name of the image, for masks that are too large for `F.squared_distance`.
    """
    try:
        squared = F.squared_distance(mask)
    except ValueError as error:
        height, width = mask.shape
        raise UserError(
            f"{name}: glands that touch over {width} x {height} pixels are too large to be separated by their distance "
            "to the background; take a checkpoint with an sdf expert, or leave out --instances"
        ) from error
    return squared.clamp(min=0).sqrt().numpy() * mask


def skimage() -> ModuleType:
    """scikit-image, which only instances and their polygons need. Raises UserError if it is not installed."""
    try:
        import skimage.measure
        import skimage.segmentation
    except ModuleNotFoundError:
        raise UserError(
            "scikit-image, which separates instances, is not installed: run `pip install scikit-image`"
        ) from None
    return skimage
