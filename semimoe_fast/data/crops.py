"""Random crops of images of any size: drawn on the CPU, cut in one batched gather on the device of the images.

A crop is a square of the image at its own scale times a jitter, which becomes S x S pixels in one of the eight
symmetries of the square. An image gives max(1, area / S^2) crops an epoch on average: every part of the tissue is seen
about equally often, and every small image too. Half of the labeled crops hold a random foreground pixel of the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .augment import Augmentation
from .ragged import Ragged

JITTER = 1.25  # default scale jitter, see Crops
FOREGROUND = 0.5  # probability that a labeled crop is placed around a random foreground pixel


class Crops:
    """Crops of S x S pixels of a set of images whose pixels are on any device; draws need the masks on the CPU too.

    size: S in pixels. jitter: crops are magnified by 1 / jitter to jitter, uniformly in the logarithm. The squares lie
    inside the image, at a uniformly random place, if the image is large enough. A smaller image is inside the square,
    at a random place too, surrounded by its mirror images.
    """

    def __init__(self, images: Ragged, size: int, device: torch.device, jitter: float = JITTER) -> None:
        self.images, self.size, self.jitter = images.to(device), size, jitter
        self.shares = shares(images, size)
        self.foreground = None if images.masks is None else Foreground(images)

    @property
    def count(self) -> int:
        """Crops in an epoch."""
        return crops_in(self.images, self.size)

    def order(self, needed: int, random: torch.Generator) -> Tensor:
        """Images of the crops of an epoch, int64 (needed,), shuffled.

        Systematic sampling: the crops of an image are its share of `needed`, rounded up or down.
        """
        ends = self.shares.cumsum(0)
        ticks = (torch.arange(needed) + torch.rand(1, generator=random, dtype=torch.float64)) / needed
        rows = torch.searchsorted(ends, ticks * ends[-1], right=True).clamp(max=len(ends) - 1)
        return rows[torch.randperm(needed, generator=random)]

    def draw(self, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Augmentation]:
        """Draw a crop of each of the given images, int64 (B,), from a CPU generator.

        Returns the corners of the windows that hold the crops, int64 (B, 2), and the crops within these windows.
        """
        scale, lift, where, *place = torch.rand(5, len(rows), generator=random, dtype=torch.float64)
        coins = torch.rand(len(rows), 3, generator=random) < 0.5
        extent, place = extents(self.size, self.jitter, scale), torch.stack(place, 1)
        room = self.images.sizes[rows] - extent[:, None]
        corner = corners(room, place)
        if self.foreground is not None:
            pixel, found = self.foreground.find(rows, where)
            around = (pixel - (place * extent[:, None]).long()).clamp(room.clamp(max=0), room.clamp(min=0))
            corner = torch.where((found & (lift < FOREGROUND))[:, None], around, corner)
        within = torch.zeros_like(corner)
        return corner, Augmentation(within, extent, coins[:, :2], coins[:, 2])

    def cut(self, rows: Tensor, corner: Tensor) -> tuple[Tensor, Tensor | None]:
        """The windows of crops: images, uint8 (B, 3, L, L), and masks (B, L, L) or None, on the device."""
        return self.images.windows(rows, corner, math.ceil(self.jitter * self.size))


def extents(size: int, jitter: float, draws: Tensor) -> Tensor:
    """Sides of squares that become `size` pixels, 1 / jitter to jitter times as long: int64 (B,), of uniform draws."""
    return (size * jitter ** (2 * draws - 1)).round().long()


def corners(room: Tensor, draws: Tensor) -> Tensor:
    """Corners of squares at random places, int64 (B, 2), of uniform draws (B, 2).

    room: sides of the images less those of the squares, int64 (B, 2). Negative room is outside the image.
    """
    low, high = room.clamp(max=0), room.clamp(min=0)
    return low + (draws * (high - low + 1)).long()


def crops_in(images: Ragged, size: int) -> int:
    """Crops of size x size pixels in an epoch, at least one for every image."""
    return round(shares(images, size).sum().item())


def shares(images: Ragged, size: int) -> Tensor:
    """Crops that an image gives in an epoch on average, float64 (N,)."""
    return (images.sizes.prod(1).double() / size**2).clamp(min=1)


class Foreground:
    """Finds random foreground pixels of labeled images. It keeps one number for each row of each image."""

    def __init__(self, images: Ragged) -> None:
        self.images = images
        counts = [(images.mask(index) != 0).sum(1) for index in range(len(images))]
        self.first_row = torch.tensor([0, *(len(count) for count in counts)]).cumsum(0)  # of each image, and the end
        self.before = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0)  # foreground above each row

    def find(self, rows: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """The pixel at a fraction `where` in [0, 1), (B,), of the foreground of each of the images int64 (B,).

        Returns row and column, int64 (B, 2), and whether the image has foreground at all, bool (B,).
        """
        start, end = (self.before[self.first_row[rows + k]] for k in range(2))
        number = start + (where * (end - start)).long()
        line = torch.searchsorted(self.before, number, right=True) - 1
        pixels = torch.zeros(len(rows), 2, dtype=torch.int64)
        for index, image in enumerate(rows.tolist()):
            if start[index] < end[index]:
                row = int(line[index] - self.first_row[image])
                columns = self.images.mask(image)[row].nonzero()
                pixels[index] = torch.tensor([row, int(columns[number[index] - self.before[line[index]]])])
        return pixels, start < end
