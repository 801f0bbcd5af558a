"""Instances of an image that arrives in pieces of rows, with memory that does not depend on the height of the image.

An instance depends on nothing but its component of the mask: its seeds have a level of their own, and the watershed
stays inside. So a window of rows starts where the first open component does, one that may continue below the window.
A component is complete when it does not touch the last row of the window. Then `instances_of` separates it as a whole,
and it leaves the window. So components of at most TALL rows have the instances that `instances_of` finds in the whole
image. Only their numbers differ, and pixels of equal field between two instances: the watershed of scikit-image
gives them to either, depending on its queue.

The window never holds more than TALL rows and a piece, so taller components are separated in parts. When more than TALL
rows of an open component are held, it is separated as it is, and two kinds of instances leave it: those that end more
than TALL / 4 rows above the end of the window, and those of more than TALL rows, which are cut there. What remains goes
on as a component. Its instances may differ from those of the whole image, because their seed level knows a part of the
component only; every pixel is still in one instance or in a dropped small one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from .instances import EIGHT, depth, instances_of, renumber

TALL = 1024  # rows
PIECE = 512  # most rows that are added to the window at once, which bounds its memory

Box = tuple[slice, slice]  # rows of the window, and columns
Found = Callable[
    [np.ndarray, int, int], object
]  # int32 (h, w) with the numbers of some instances, row and column of it


class Stitcher:
    """Instances of an image of `size` (H, W) whose mask and signed distance field arrive in pieces of full rows.

    found: called once for each complete component, or part of a tall one, that holds instances: with their label image,
    in which 0 is everything else, and the row and column of its first pixel in the image. The numbers go from 1 on, in
    the order of the calls, and in a call in the order of the first pixels. seed_level, least_area: as in
    `instances_of`. tall: rows of the tallest component that is separated as a whole. name: of the image, for errors.
    """

    def __init__(
        self,
        size: tuple[int, int],
        found: Found,
        seed_level: float = 0.3,
        least_area: int = 100,
        tall: int = TALL,
        name: Path | str = "the image",
    ) -> None:
        self.size, self.found, self.seed_level, self.least_area, self.tall = size, found, seed_level, least_area, tall
        self.name = name
        self.count = 0  # instances so far
        self._top = 0  # row of the image in which the window begins
        self._mask = np.zeros((0, size[1]), bool)  # without what is complete
        self._sdf = np.zeros((0, size[1]), np.float32)
        self._labels = np.zeros((0, size[1]), np.uint32)  # what is complete

    def add(self, mask: np.ndarray, sdf: np.ndarray | None = None) -> np.ndarray:
        """Add the next rows (n, W): a mask and its field, or None for the distance to the background.

        -> the next rows of the label image, uint32 (m, W), which no later instance changes; m can be 0. After the last
        rows of the image, all rows of the label image have been returned.
        """
        parts = [
            self._add(mask[start : start + PIECE], None if sdf is None else sdf[start : start + PIECE])
            for start in range(0, len(mask), PIECE)
        ]
        return np.concatenate([self._labels[:0], *parts])

    def _add(self, mask: np.ndarray, sdf: np.ndarray | None) -> np.ndarray:
        self._mask = np.concatenate([self._mask, mask])
        self._sdf = None if sdf is None else np.concatenate([self._sdf, sdf])
        self._labels = np.concatenate([self._labels, np.zeros(mask.shape, np.uint32)])
        self._separate()
        return self._leave()

    def _separate(self) -> None:
        """Number the instances that are complete, and take them out of the mask."""
        components, _ = ndimage.label(self._mask, EIGHT)
        height = len(components)
        is_last = self._top + height == self.size[0]
        going_on = set() if is_last else set(np.unique(components[-1]).tolist())
        for component, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
            if component in going_on and height - rows.start <= self.tall:
                continue
            box = _around(rows), _around(columns)
            pixels = components[box] == component
            if component in going_on:
                instances = self._instances(box, pixels, least_area=0)
                leaving = self._leaving(instances)
                self._number(box, renumber(instances * leaving, self.least_area))
                pixels &= leaving
            elif np.count_nonzero(pixels) >= self.least_area:
                self._number(box, self._instances(box, pixels, self.least_area))
            self._mask[box][pixels] = False

    def _instances(self, box: Box, pixels: np.ndarray, least_area: int) -> np.ndarray:
        field = depth(pixels, self.name) if self._sdf is None else self._sdf[box]
        return instances_of(pixels, field, self.seed_level, least_area)

    def _leaving(self, instances: np.ndarray) -> np.ndarray:
        """The pixels of a tall component, which ends with the window, whose instances leave it."""
        near_the_end = np.isin(instances, instances[-(self.tall // 4) :])
        tall = np.isin(instances, instances[: -self.tall])
        return ~near_the_end | tall

    def _number(self, box: Box, instances: np.ndarray) -> None:
        """Give instances that are numbered from 1 their final numbers, and pass them on."""
        count = int(instances.max(initial=0))
        if count:
            numbers = np.where(instances > 0, instances + self.count, 0)
            self._labels[box][instances > 0] = numbers[instances > 0]
            self.count += count
            self.found(numbers, self._top + box[0].start, box[1].start)

    def _leave(self) -> np.ndarray:
        """Rows above the first open component leave the window, but for one, the background that `depth` needs."""
        height = len(self._mask)
        if self._top + height == self.size[0]:
            count = height
        else:
            used = np.flatnonzero(self._mask.any(1))
            count = max(0, (used[0] if len(used) else height) - 1)
        rows = self._labels[:count]
        self._top += count
        self._mask, self._labels = self._mask[count:], self._labels[count:]
        if self._sdf is not None:
            self._sdf = self._sdf[count:]
        return rows


def _around(pixels: slice) -> slice:
    """A slice with the pixels before and behind it, as far as there are any: `depth` needs the background there."""
    return slice(max(0, pixels.start - 1), pixels.stop + 1)
