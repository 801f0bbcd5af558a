"""Random crops and symmetries of a batch, drawn on the CPU and applied in one pass on the batch's own device.

The published recipe: with probability 0.5 a random crop of 7/8 of the side, resized back; with probability 0.75 a
flip (rows, columns or both, equally likely); with probability 0.5 a transpose; always a rotation by a random multiple
of 90 degrees. Flip, transpose and rotation are elements of the square's symmetry group D4, and the last two alone,
a transpose by a fair coin and one of four rotations, already give each of its eight elements with probability 1/8;
whatever flip came before, the product stays uniform. Three fair coins (flip the rows, flip the columns, transpose)
draw the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Channels = Sequence[float] | Tensor  # a number for each channel


class Augmentation(NamedTuple):
    """What to do to each of B images: cut out a square, resize it to the image's size, transpose that, flip that."""

    corner: Tensor  # int64 (B, 2): first row and column of the square, in pixels
    extent: Tensor  # int64 (B,): its side, in pixels
    flip: Tensor  # bool (B, 2): reverse the order of the rows, of the columns
    transpose: Tensor  # bool (B,)


def draw(batch: int, size: int, generator: torch.Generator) -> Augmentation:
    """Draw the augmentation of `batch` images of size x size pixels from a CPU generator; all tensors on the CPU."""
    cropped = torch.rand(batch, generator=generator) < 0.5
    crop = round(size * 7 / 8)
    corner = torch.randint(size - crop + 1, (batch, 2), generator=generator) * cropped[:, None]
    coins = torch.rand(batch, 3, generator=generator) < 0.5
    return Augmentation(corner, torch.where(cropped, crop, size), coins[:, :2], coins[:, 2])


def apply(
    images: Tensor, masks: Tensor | None, augmentation: Augmentation, mean: Channels, std: Channels
) -> tuple[Tensor, Tensor | None]:
    """Augment images, uint8 (B, 3, S, S), and masks, uint8 (B, S, S), on their device, and normalize the images.

    Images are resized bilinearly (half-pixel centers, clamped to the crop, no antialiasing), masks by nearest
    neighbor with index floor(i * extent / S): OpenCV's INTER_LINEAR and INTER_NEAREST. `mean` and `std` are of pixels
    in [0, 1], a number for each channel. Returns float32 images and uint8 masks (None without masks), shaped as they
    came. The device is never waited for. Raises ValueError where the images are not square or do not match the masks
    or the augmentation.
    """
    batch, _, size, width = images.shape
    if size != width:
        raise ValueError(f"augmentation takes square images, got {size} x {width}")
    if len(augmentation.extent) != batch or (masks is not None and masks.shape != (batch, size, size)):
        raise ValueError(
            f"images {tuple(images.shape)}, masks {None if masks is None else tuple(masks.shape)} and an augmentation "
            f"of {len(augmentation.extent)} do not belong together"
        )
    augmentation = Augmentation(*(field.to(images.device, non_blocking=True) for field in augmentation))
    row, column = _sources(augmentation, _linear(augmentation.extent, size))
    grid = torch.stack([column, row], -1) * (2 / size) + (1 / size - 1)  # grid_sample's units: -1 and 1 are the edges
    sampled = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    if masks is not None:
        row, column = _sources(augmentation, _nearest(augmentation.extent, size))
        masks = masks[torch.arange(batch, device=masks.device)[:, None, None], row, column]
    return _standardize(sampled, mean, std), masks


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """(image / 255 - mean) / std per channel: uint8 (..., 3, H, W) to float32, `mean` and `std` of pixels in [0, 1]."""
    return _standardize(images.float(), mean, std)


def _standardize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    return (images / 255 - _per_channel(mean, images.device)) / _per_channel(std, images.device)


def _per_channel(values: Channels, device: torch.device) -> Tensor:
    # By way of a CPU tensor: to make one on the device from a list would wait for the device.
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1).to(device, non_blocking=True)


def _linear(extent: Tensor, size: int) -> Tensor:
    """Where in a crop of `extent` (B,) the pixels of its resized copy lie, float32 (B, size), half-pixel centers."""
    extent = extent[:, None].float()
    position = (torch.arange(size, device=extent.device) + 0.5) * (extent / size) - 0.5
    return position.clamp(min=0).minimum(extent - 1)


def _nearest(extent: Tensor, size: int) -> Tensor:
    """Which pixel of a crop of `extent` (B,) each pixel of its resized copy takes, int64 (B, size)."""
    return torch.arange(size, device=extent.device) * extent[:, None] // size


def _sources(augmentation: Augmentation, position: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the source of every output pixel, (B, S, S) each, from the positions in the crop (B, S)."""
    reverse = augmentation.flip[:, :, None]
    along = torch.where(reverse, position.flip(-1)[:, None], position[:, None])  # (B, 2, S): rows, columns
    along = along + augmentation.corner[:, :, None]
    transpose = augmentation.transpose[:, None, None]
    row = torch.where(transpose, along[:, 0, None, :], along[:, 0, :, None])
    column = torch.where(transpose, along[:, 1, :, None], along[:, 1, None, :])
    return row, column
