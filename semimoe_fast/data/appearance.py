"""Random changes of color and sharpness of a batch: H&E stain, brightness, blur and noise.

Drawn on the CPU, applied on the device of the batch, after the geometry (`augment.resample`) and before normalization.

Stain jitter (Tellez et al. 2018): the optical density -ln(pixel / 255) is a mixture of hematoxylin, eosin and a
residual. The amounts of hematoxylin and eosin are scaled by 1 - s to 1 + s and shifted by -s to s. Unmixing, change
and mixing are one affine map of the density, so a pixel costs three logarithms, a 3 x 3 matrix and three powers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..ops import _native, _native_blur

# Optical densities (red, green, blue) of hematoxylin, eosin and the residual that is perpendicular to both, each of
# unit length: Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution".
_HE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
_HE /= np.linalg.norm(_HE, axis=1, keepdims=True)
_RESIDUAL = np.cross(*_HE)
STAINS = np.vstack([_HE, _RESIDUAL / np.linalg.norm(_RESIDUAL)])

NEGLIGIBLE = 2**-26  # weights of a blur that change a pixel by less than 1e-5 of 255


@dataclass(frozen=True)
class Strengths:
    """The largest change of each kind; 0 is none."""

    stain: float = 0.0  # relative change of the amounts of both stains, and shift in units of optical density
    brightness: float = 0.0  # relative change, up to 1
    blur: float = 0.0  # standard deviation of the Gaussian in pixels
    noise: float = 0.0  # standard deviation in units of the full range 255

    def __bool__(self) -> bool:
        return any((self.stain, self.brightness, self.blur, self.noise))


class Density(NamedTuple):
    """Affine map from the natural logarithms of pixels to the binary ones of their change.

    torch computes powers of 2 faster than those of e on a CPU.
    """

    matrix: Tensor  # (B, 3, 3)
    shift: Tensor  # (B, 3, 1)


class Noise(NamedTuple):
    """Gaussian noise."""

    std: Tensor  # (B,) in pixel values
    place: Tensor  # int64 (B,): where the noise of an image begins in the table of random numbers


class Appearance(NamedTuple):
    """Changes of B images, float32, in the order of use; None for a kind that is off."""

    density: Density | None
    gain: Tensor | None  # factor of brightness (B,)
    kernel: Tensor | None  # weights at the distances 0 to R of a symmetric blur (B, R + 1)
    noise: Noise | None


def draw(batch: int, size: int, strengths: Strengths, generator: torch.Generator) -> Appearance | None:
    """Draw the changes of `batch` images of size x size pixels from a CPU generator; None if all are off.

    Uniform: the factors and shifts of both stains, the factor of brightness, and the standard deviations of blur (from
    0) and noise (from 0). All tensors are on the CPU.
    """
    if not strengths:
        return None
    draws = torch.rand(8, batch, generator=generator, dtype=torch.float64)
    stains, (brightness, blur, noise, place) = 2 * draws[:4] - 1, draws[4:]
    density = gain = kernel = grain = None
    if strengths.stain:
        density = _density(1 + strengths.stain * stains[:2].T, strengths.stain * stains[2:].T)
    if strengths.brightness:
        gain = (1 + strengths.brightness * (2 * brightness - 1)).float()
    if strengths.blur:
        kernel = _gaussian(strengths.blur * blur, math.ceil(3 * strengths.blur)).float()
    if strengths.noise:
        values = 3 * size**2
        grain = Noise((255 * strengths.noise * noise).float(), (place * (values + 1)).long())
    return Appearance(density, gain, kernel, grain)


def apply(images: Tensor, appearance: Appearance) -> Tensor:
    """Change images, float32 (B, 3, S, S) in [0, 255], in place, and return them in [0, 255]; all on one device.

    A CPU changes image by image, because one image stays in its cache from change to change. Does not synchronize with
    the device.
    """
    batch = len(images)
    for part in [slice(i, i + 1) for i in range(batch)] if images.is_cpu else [slice(0, batch)]:
        _change(images[part], appearance, part)
    return images


def _change(images: Tensor, appearance: Appearance, part: slice) -> None:
    """Change the images of a part of the batch."""
    density, gain, kernel, noise = appearance
    if density is not None:
        logarithm = _log(images.clamp_(min=1)).flatten(2)
        product = torch.baddbmm if images.is_cpu else _baddbmm
        changed = product(density.shift[part], density.matrix[part], logarithm)
        torch.exp2(changed.view(images.shape), out=images)
    if gain is not None:
        images.mul_(gain[part].view(-1, 1, 1, 1))
    if kernel is not None:
        _blur(images, kernel[part])
    if noise is not None:
        table = _noise_table(2 * images[0].numel(), images.device)
        grain = table.unfold(0, images[0].numel(), 1)[noise.place[part]].view(images.shape)
        images.addcmul_(noise.std[part].view(-1, 1, 1, 1), grain)
    images.clamp_(0, 255)


def _log(images: Tensor) -> Tensor:
    """The natural logarithm, in place; on a CPU by NumPy, 2.5 to 3 times as fast as torch on one thread."""
    if not images.is_cpu:
        return images.log_()
    np.log(images.numpy(), out=images.numpy())
    return images


def _baddbmm(shift: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """As torch.baddbmm for (B, 3, 1), (B, 3, 3) and (B, 3, P), which on a GPU may round to TF32."""
    for channel in range(3):
        shift = torch.addcmul(shift, matrix[:, :, channel, None], x[:, channel, None])
    return shift


def _density(scale: Tensor, shift: Tensor) -> Density:
    """Scale and shift the amounts of both stains, each (B, 2).

    The density d = -ln(pixel / 255) becomes M d + t, so ln(pixel) becomes M ln(pixel) + ln(255) (1 - M 1) - t. All is
    divided by ln 2 for a binary logarithm.
    """
    stains = torch.from_numpy(STAINS)  # density = stains^T @ amounts
    scale = torch.cat([scale, torch.ones(len(scale), 1)], 1)
    matrix = stains.T @ (scale[:, :, None] * torch.linalg.inv(stains.T))
    shift = math.log(255) * (1 - matrix.sum(2, keepdim=True)) - stains[:2].T @ shift[:, :, None]
    return Density((matrix / math.log(2)).float(), (shift / math.log(2)).float())


def _gaussian(sigma: Tensor, radius: int) -> Tensor:
    """Weights of Gaussians at the distances 0 to `radius`, (B, radius + 1); both sides together sum to 1."""
    distance = torch.arange(radius + 1)
    weight = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2)
    return weight / (2 * weight.sum(1, keepdim=True) - weight[:, :1])


def _blur(images: Tensor, kernel: Tensor) -> None:
    """Blur images (B, 3, H, W) with a symmetric kernel each; on a CPU by the compiled module, if there is one."""
    if images.is_cpu:  # a GPU would have to wait for the weights
        kernel = kernel[:, : max(1, int((kernel > NEGLIGIBLE).any(0).sum()))]
        if images.is_contiguous() and _native.serves_cpu():
            _native_blur.convolve_(images, kernel)
            return
    _convolve(images, kernel)


def _convolve(images: Tensor, kernel: Tensor) -> None:
    """Convolve columns and rows of images (B, 3, H, W) with a symmetric kernel each, mirrored at the borders."""
    radius = kernel.shape[1] - 1
    center, *others = kernel.T[:, :, None, None, None]
    for axis in (2, 3):
        side = images.shape[axis]
        padded = functional.pad(images, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="reflect")
        torch.mul(padded.narrow(axis, radius, side), center, out=images)
        for distance, weight in enumerate(others, 1):
            images.addcmul_(padded.narrow(axis, radius - distance, side), weight)
            images.addcmul_(padded.narrow(axis, radius + distance, side), weight)


@functools.cache  # of any size: captured CUDA graphs go on reading a table
def _noise_table(length: int, device: torch.device) -> Tensor:
    """Normal random numbers, float32 (length,), the same on every device. The noise of an image is a random part of it.

    A batch draws its places only: new random numbers would depend on the device, and cost more than all other changes.
    """
    return torch.randn(length, generator=torch.Generator().manual_seed(0)).to(device)
