"""Images and masks of a data folder at a given number of microns a pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import resampling
from .folders import Pair, alone_if_large, read_whole
from .readers import SAME, ArrayReader, Resampled, mpp_of, scale_between, scaled_size


def size_at(path: Path, size: tuple[int, int], own: float | None, mpp: float | None) -> tuple[int, int]:
    """(H, W) at `mpp` microns a pixel of the image of a file, of `size` (H, W), that has `own`.

    The image stays as it is if either is None, or if they differ by less than 2 %. Raises UserError for scales that
    make no sense (`readers.SCALES`).
    """
    return scaled_size(size, scale_between(path, own, mpp)) if differs(own, mpp) else size


def differs(own: float | None, mpp: float | None) -> bool:
    """Whether an image of `own` microns a pixel is resampled to be read at `mpp`."""
    return own is not None and mpp is not None and abs(own / mpp - 1) >= SAME


def read_scaled(pair: Pair, instances: bool = False, mpp: float | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """`folders.read_whole` at `mpp` microns a pixel if the image's file says its own, else as it is.

    Images are resampled as by `readers.Resampled`, with antialiasing; masks take the pixel that holds each center.
    Threads decode large images one after another.
    """
    if mpp is None:
        return read_whole(pair, instances)
    with alone_if_large(pair.image):
        image, mask = read_whole(pair, instances)
        size = size_at(pair.image, image.shape[:2], mpp_of(pair.image), mpp)
        if size == image.shape[:2]:
            return image, mask
        image = Resampled(ArrayReader(image), size).read(0, 0, *size)
        return image, None if mask is None else resampling.nearest(mask, size)
