"""What the readers of all formats have in common: an image that is read by region, and how large its pixels may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

PLAUSIBLE_MPP = 0.02, 20.0  # of a microscope; 72, 96 and 300 dpi, which programs write by default, are 353 to 85


class Reader(ABC):
    """An RGB image that is read by region. Use it as a context manager, or close it."""

    def __init__(self, size: tuple[int, int], path: Path | None = None, mpp: float | None = None) -> None:
        self.size = size  # (H, W) in pixels, at the scale that `read` gives
        self.path = path
        self.mpp = mpp  # microns per pixel of `size`, None if the file does not say so
        self.full_size = size  # (H, W) of the file's own pixels
        self.note: str | None = None  # what a command says about this file, in one line

    def read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Pixels of a region inside the image, uint8 (height, width, 3); the array may be shared, do not write to it.

        Raises ValueError for a region outside the image, UserError for damaged pixels.
        """
        inside = 0 <= row <= row + height <= self.size[0] and 0 <= column <= column + width <= self.size[1]
        if not inside or 0 in (height, width):
            region = f"{height} x {width} pixels from ({row}, {column})"
            raise ValueError(f"{region} are no region of an image of {self.size[0]} x {self.size[1]}")
        return self._read(row, column, height, width)

    @abstractmethod
    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """`read` of a region that is inside the image."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; further reads fail."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def plausible_mpp(value: Any, unit: float | None = 1.0) -> float | None:
    """Microns per pixel of a number in a file, in a unit of so many microns; None if no microscope has such pixels.

    Files may say 72 dots per inch, 0, NaN or text.
    """
    try:
        mpp = float(value) * float(unit)
    except (TypeError, ValueError):
        return None
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None
