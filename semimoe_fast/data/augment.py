"""Random crops and symmetries of a batch: drawn on the CPU, applied in one pass on the device of the batch.

The published recipe: with probability 0.5 a random crop of 7/8 of the side, resized back; with probability 0.75 a
flip (rows, columns or both, equally likely); with probability 0.5 a transpose; always a rotation by a random multiple
of 90 degrees. All but the crop are in the symmetry group D4 of the square. A transpose with probability 0.5 followed
by a random rotation is uniform over the eight elements of D4, and a flip before them keeps the product uniform. So this
module tosses three fair coins instead (flip the rows, flip the columns, transpose), which is uniform over D4 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Channels = Sequence[float] | Tensor  # one number per channel


class Augmentation(NamedTuple):
    """Parameters of B images, in the order of use: crop a square, resize it to the image size, transpose, flip."""

    corner: Tensor  # int64 (B, 2): first row and first column of the square, in pixels
    extent: Tensor  # int64 (B,): side of the square, in pixels
    flip: Tensor  # bool (B, 2): reverse the rows, reverse the columns
    transpose: Tensor  # bool (B,)


def draw(batch: int, size: int, generator: torch.Generator) -> Augmentation:
    """Draw the augmentation of `batch` images of size x size pixels from a CPU generator; all tensors on the CPU."""
    cropped = torch.rand(batch, generator=generator) < 0.5
    crop = round(size * 7 / 8)
    corner = torch.randint(size - crop + 1, (batch, 2), generator=generator) * cropped[:, None]
    coins = torch.rand(batch, 3, generator=generator) < 0.5
    return Augmentation(corner, torch.where(cropped, crop, size), coins[:, :2], coins[:, 2])


def resample(
    images: Tensor, masks: Tensor | None, augmentation: Augmentation, size: int, centered: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Crop, resize, transpose and flip images, uint8 (B, 3, L, L), and masks (B, L, L) of any dtype on their device.

    A crop may lie outside the image by up to L pixels on each side: the mirror image fills the rest.
    Images are resized as by OpenCV's INTER_LINEAR (bilinear, half-pixel centers, clamped to the crop, no antialiasing)
    and masks as by INTER_NEAREST: pixel i takes pixel floor(i * extent / size), which lies about half a pixel before
    its image. centered: pixel i of a mask takes the pixel that holds its center, floor((i + 1/2) * extent / size).
    size: S, side of the results in pixels. Returns images, float32 (B, 3, S, S) in [0, 255], and masks (B, S, S) of the
    given dtype, or None without masks. Does not synchronize with the device. Raises ValueError if images are not square
    or do not match masks or augmentation.
    """
    batch, _, side, width = images.shape
    if side != width:
        raise ValueError(f"augmentation takes square images, got {side} x {width}")
    if len(augmentation.extent) != batch or (masks is not None and masks.shape != (batch, side, side)):
        raise ValueError(
            f"images {tuple(images.shape)}, masks {None if masks is None else tuple(masks.shape)} and an augmentation "
            f"of {len(augmentation.extent)} do not match"
        )
    augmentation = Augmentation(*(field.to(images.device, non_blocking=True) for field in augmentation))
    row, column = _sources(augmentation, _linear(augmentation.extent, size), side)
    grid = torch.stack([column, row], -1) * (2 / side) + (1 / side - 1)  # grid_sample's units: -1 and 1 are the edges
    sampled = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    if masks is not None:
        row, column = _sources(augmentation, _nearest(augmentation.extent, size, centered), side)
        masks = masks[torch.arange(batch, device=masks.device)[:, None, None], row, column]
    return sampled, masks


def whole(images: Tensor, size: int) -> Tensor:
    """`resample` of whole images, without other changes."""
    batch, coins = len(images), torch.zeros(len(images), 3, dtype=torch.bool)
    corner, extent = torch.zeros(batch, 2, dtype=torch.int64), torch.full((batch,), images.shape[-1])
    return resample(images, None, Augmentation(corner, extent, coins[:, :2], coins[:, 2]), size)[0]


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """(image / 255 - mean) / std per channel: pixels in [0, 255], uint8 or float32 (..., 3, H, W), to float32.

    mean, std: of pixels in [0, 1].
    """
    return (images.float() / 255 - _per_channel(mean, images.device)) / _per_channel(std, images.device)


def _per_channel(values: Channels, device: torch.device) -> Tensor:
    # A CPU tensor first: creating a tensor on the device from a list synchronizes.
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1).to(device, non_blocking=True)


def _linear(extent: Tensor, size: int) -> Tensor:
    """Positions in a crop of side `extent` (B,) that the pixels of the resized crop sample, float32 (B, size)."""
    extent = extent[:, None].float()
    position = (torch.arange(size, device=extent.device) + 0.5) * (extent / size) - 0.5
    return position.clamp(min=0).minimum(extent - 1)


def _nearest(extent: Tensor, size: int, centered: bool) -> Tensor:
    """Indices in a crop of side `extent` (B,) that the pixels of the resized crop copy, int64 (B, size)."""
    position = 2 * torch.arange(size, device=extent.device) + int(centered)  # in half pixels
    return position * extent[:, None] // (2 * size)


def _sources(augmentation: Augmentation, position: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Source row and source column of every output pixel, each (B, S, S), from positions in the crop (B, S)."""
    reverse = augmentation.flip[:, :, None]
    along = torch.where(reverse, position.flip(-1)[:, None], position[:, None])  # (B, 2, S): rows, columns
    along = along + augmentation.corner[:, :, None]
    along = torch.where(along < -0.5, -1 - along, along)  # pixel -1 is the mirror image of pixel 0
    along = torch.where(along > side - 0.5, 2 * side - 1 - along, along)
    transpose = augmentation.transpose[:, None, None]
    row = torch.where(transpose, along[:, 0, None, :], along[:, 0, :, None])
    column = torch.where(transpose, along[:, 1, :, None], along[:, 1, None, :])
    return row, column
