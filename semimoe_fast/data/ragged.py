"""Images of any size in flat tensors: read from a data folder, and windows of them cut in one batched gather."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .folders import Dataset, Pair, in_threads, list_pairs
from .scaled import read_scaled


@dataclass
class Ragged:
    """N images of any size, one after the other, each row by row. P: pixels of all images.

    Do not write to the tensors, which may be mapped from a file. `starts` and `sizes` are on the CPU.
    """

    pixels: Tensor  # uint8 (P, 3)
    masks: Tensor | None  # (P,), uint8 0/1 or int32 ids of instances, 0 is background
    starts: Tensor  # int64 (N,): index of the first pixel of each image
    sizes: Tensor  # int64 (N, 2): height and width
    names: list[str]  # file names without suffix

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> Ragged:
        return Ragged(self.pixels, self.masks, self.starts[rows], self.sizes[rows], self.names[rows])

    def image(self, index: int) -> Tensor:
        """uint8 (H, W, 3)."""
        return self._of(self.pixels, index)

    def mask(self, index: int) -> Tensor:
        """(H, W), of the dtype of `masks`."""
        return self._of(self.masks, index)

    def _of(self, flat: Tensor, index: int) -> Tensor:
        start, (height, width) = int(self.starts[index]), self.sizes[index].tolist()
        return flat[start : start + height * width].unflatten(0, (height, width))

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + (0 if self.masks is None else self.masks.nbytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and pixels; computed once, because it reads all pixels."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.contiguous().numpy())
        for flat in (self.pixels, self.masks):
            for index in range(len(self) if flat is not None else 0):
                digest.update(self._of(flat, index).numpy())
        return digest.hexdigest()

    def windows(self, rows: Tensor, corners: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        """Cut one square of side x side pixels out of each of B images, on the device of the pixels.

        rows: indices of the images, int64 (B,). corners: first row and column of the squares, int64 (B, 2), of any
        sign. Pixels outside an image are its mirror image, c b a | a b c | c b a, repeated as often as necessary.
        Returns images, uint8 (B, 3, side, side), in the order of channels-last memory, and masks (B, side, side).
        """
        device = self.pixels.device
        starts, sizes, corners = (
            tensor.to(device, non_blocking=True) for tensor in (self.starts[rows], self.sizes[rows], corners)
        )
        span = torch.arange(side, device=device)
        row, column = (mirrored(corners[:, k, None] + span, sizes[:, k, None]) for k in range(2))  # (B, side)
        index = starts[:, None, None] + row[:, :, None] * sizes[:, 1, None, None] + column[:, None, :]
        images = self.pixels[index].permute(0, 3, 1, 2)
        return images, None if self.masks is None else self.masks[index]

    def centers(self, side: int) -> Dataset:
        """The window in the middle of each image, as a dataset of side x side pixels."""
        images, masks = self.windows(torch.arange(len(self)), (self.sizes - side) // 2, side)
        return Dataset(images, masks, self.names)

    def to(self, device: torch.device) -> Ragged:
        """The same with pixels and masks on a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Ragged(self.pixels.to(device), masks, self.starts, self.sizes, self.names)


def mirrored(position: Tensor, length: Tensor) -> Tensor:
    """The index from 0 to length - 1 whose pixel stands at an integer position: c b a | a b c | c b a."""
    position = position.remainder(2 * length)
    return position.minimum(2 * length - 1 - position)


def starts_of(sizes: Tensor) -> Tensor:
    """Index of the first pixel of each image, int64 (N,), from heights and widths (N, 2)."""
    areas = sizes.prod(1)
    return areas.cumsum(0) - areas


def load_whole(root: Path, part: str, with_masks: bool, instances: bool = False, mpp: float | None = None) -> Ragged:
    """Read ROOT/PART as it is, or at `mpp` microns a pixel as `read_scaled` does.

    The other options and the errors are those of `folders.load_part`.
    """
    return read_ragged(list_pairs(root, part, with_masks), part, instances, mpp)


def read_ragged(pairs: Sequence[Pair], title: str, instances: bool = False, mpp: float | None = None) -> Ragged:
    """Decode files in memory and show a progress bar. Raises UserError as `folders.read_whole` does."""
    images, masks = zip(*in_threads(lambda pair: read_scaled(pair, instances, mpp), pairs, title), strict=True)
    sizes = torch.tensor([image.shape[:2] for image in images])
    return Ragged(
        pixels=torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])),
        masks=None if masks[0] is None else torch.from_numpy(np.concatenate([mask.ravel() for mask in masks])),
        starts=starts_of(sizes),
        sizes=sizes,
        names=[pair.image.stem for pair in pairs],
    )
