"""The three objectives of S sets of predictions against one set of targets; forward and backward read memory once each.

With P the softmax of the logits, T the one-hot target, and sums over the pixels of one image,

    mask      mean over images and classes of 1 - (2 sum P T + 1) / (sum (P^2 + T) + 1)         (T^2 = T)
    boundary  mean over images and classes of 1 - (2 sum P T + e) / (sum (P + T) + e)           e = 1e-8
    sdf       mean over pixels of (tanh(raw) - sdf)^2

so both dice losses are 1 - ratio, ratio = (2 overlap + e) / (mass + e), and their derivatives need two numbers for
each set, image and class: with n = images x classes, dL/dP = T alpha + beta * (P for the mask, 1 for the boundary),

    alpha = -2 / (n (mass + e))        beta = ratio / (n (mass + e)), doubled for the mask.

`objective_sums_fwd_kernel` reads logits and targets and writes overlap, mass and squared error of one tile of pixels
per program. `objective_finish_fwd_kernel`, one program, adds the tiles in a fixed order (no atomics, so every run gives
the same bits) and writes the three terms, alpha and beta. `objective_bwd_kernel` reads logits, targets, alpha, beta and
the gradients of the terms, and writes the gradient of every logit, P_k (g_k - sum_j P_j g_j) with g = dL/dP.

Bytes per pixel, with K = 2, float32 logits, uint8 mask and boundary, float32 sdf: forward 20 S + 6, backward 40 S + 6
(S = 1: 26 and 46; S = 2: 46 and 86); with bfloat16 logits 10 S + 6 and 20 S + 6. The partial sums add 18 floats per
tile at S = 2, about 1/300 of that.

A tile is a run of pixels of one image by all classes. Up to eight classes, it gives every thread 16 bytes of each plane
of the widest logits: loads and stores have 128 bits if planes are contiguous and aligned, and the softmax needs no
exchange between threads. With more classes, a tile has fewer pixels. Several programs fit on a multiprocessor, so that
the loads of one overlap with the reductions of another. One axis of the grid counts tiles and images, so neither number
has a limit.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import tanh

WARPS = 4
VECTOR_BYTES = 16  # bytes of a thread's widest load
# The finish kernel takes one step at 2 x 256 x 256 pixels, with 8 loads in flight per thread.
FINISH_TILES = 256
FINISH_COLUMNS = 32
FINISH_WARPS = 16


class Planes(NamedTuple):
    """A tensor (B, channels, H, W) with one stride from pixel to pixel in a plane; strides in elements."""

    data: Tensor
    image: int
    channel: int
    pixel: int


@triton.jit
def _at(planes, image, channel, pixel):
    """Addresses of pixels."""
    return planes.data + image * planes.image + channel * planes.channel + pixel * planes.pixel


@triton.jit
def _load(planes, image, pixel, inside):
    """Pixels of the first plane."""
    return tl.load(_at(planes, image, 0, pixel), mask=inside, other=0)


@triton.jit
def _softmax(logits, image, channel, pixel, valid, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """P (BLOCK, PADDED), 0 if not valid. A NaN or inf among the logits of a pixel makes its P NaN, as in PyTorch."""
    z = tl.load(_at(logits, image, channel, pixel), mask=valid, other=0).to(DTYPE)
    z = tl.where(channel < CLASSES, z, float("-inf"))
    powers = tl.exp(z - tl.max(z, 1)[:, None])
    return tl.where(valid, powers / tl.sum(powers, 1)[:, None], 0)


@triton.jit
def _dice_sums(
    logits,  # (B, CLASSES, H, W)
    target,  # (BLOCK, 1) classes
    overlap,  # (CLASSES,) out: sum P T of this tile
    mass,  # (CLASSES,) out: sum P^2 + T, or P + T
    image,
    pixel,  # (BLOCK, 1)
    inside,  # (BLOCK, 1)
    SQUARED: tl.constexpr,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    classes = tl.arange(0, PADDED)
    channel = classes.to(tl.int64)[None, :]
    valid = inside & (channel < CLASSES)
    p = _softmax(logits, image, channel, pixel, valid, CLASSES, DTYPE)
    t = (valid & (target == channel)).to(DTYPE)
    tl.store(overlap + classes, tl.sum(p * t, 0), mask=classes < CLASSES)
    tl.store(mass + classes, tl.sum((p * p if SQUARED else p) + t, 0), mask=classes < CLASSES)


@triton.jit
def objective_sums_fwd_kernel(
    predictions,  # S x (mask logits (B, K, H, W), raw sdf (B, 1, H, W), boundary logits (B, L, H, W))
    targets,  # mask (B, 1, H, W), sdf (B, 1, H, W), boundary (B, 1, H, W)
    overlaps,  # (tiles, B, C) out, C = S K + S L
    masses,  # (tiles, B, C) out
    errors,  # (tiles, B, S) out
    batch,
    pixels,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    L: tl.constexpr,
    L_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    SETS: tl.constexpr = len(predictions)
    program = tl.program_id(0).to(tl.int64)
    image = program % batch
    pixel = (program // batch * BLOCK + tl.arange(0, BLOCK))[:, None]
    inside = pixel < pixels
    overlap = overlaps + program * SETS * (K + L)
    mass = masses + program * SETS * (K + L)
    mask = _load(targets[0], image, pixel, inside)
    sdf = _load(targets[1], image, pixel, inside).to(DTYPE)
    boundary = _load(targets[2], image, pixel, inside)
    for s in tl.static_range(SETS):
        mask_logits, raw, boundary_logits = predictions[s]
        _dice_sums(
            mask_logits, mask, overlap + s * K, mass + s * K,
            image, pixel, inside, True, K, K_PADDED, DTYPE,
        )  # fmt: skip
        first = SETS * K + s * L
        _dice_sums(
            boundary_logits, boundary, overlap + first, mass + first,
            image, pixel, inside, False, L, L_PADDED, DTYPE,
        )  # fmt: skip
        value, _ = tanh(_load(raw, image, pixel, inside).to(DTYPE))
        # outside the image both are 0
        tl.store(errors + program * SETS + s, tl.sum((value - sdf) * (value - sdf)))


@triton.jit
def objective_finish_fwd_kernel(
    overlaps,  # (tiles, B, C)
    masses,  # (tiles, B, C)
    errors,  # (tiles, B, S)
    terms,  # (3,) out
    alphas,  # (B, C) out
    betas,  # (B, C) out
    tiles,
    batch,
    pixels,
    SETS: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    C: tl.constexpr = SETS * (K + L)
    mask_term = tl.zeros([COLUMNS], DTYPE)
    boundary_term = tl.zeros([COLUMNS], DTYPE)
    for first in range(0, batch * C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)  # one per image, set and class
        overlap = tl.zeros([COLUMNS], DTYPE)
        mass = tl.zeros([COLUMNS], DTYPE)
        for start in range(0, tiles, TILES):
            tile = (start + tl.arange(0, TILES)).to(tl.int64)[:, None]
            valid = (tile < tiles) & (column < batch * C)[None, :]
            offsets = tile * batch * C + column[None, :]
            overlap += tl.sum(tl.load(overlaps + offsets, mask=valid, other=0), 0)
            mass += tl.sum(tl.load(masses + offsets, mask=valid, other=0), 0)
        is_mask = column % C < SETS * K
        smooth = tl.where(is_mask, tl.full([COLUMNS], 1, DTYPE), 1e-8)
        ratio = (2 * overlap + smooth) / (mass + smooth)
        scale = 1 / ((mass + smooth) * tl.where(is_mask, K, L) * batch)
        valid = column < batch * C
        mask_term += tl.where(valid & is_mask, 1 - ratio, 0)
        boundary_term += tl.where(valid & ~is_mask, 1 - ratio, 0)
        tl.store(alphas + column, -2 * scale, mask=valid)
        tl.store(betas + column, tl.where(is_mask, 2, 1) * ratio * scale, mask=valid)
    error = tl.zeros([TILES], DTYPE)
    for start in range(0, tiles * batch * SETS, TILES):
        index = start + tl.arange(0, TILES)
        error += tl.load(errors + index, mask=index < tiles * batch * SETS, other=0)
    tl.store(terms, tl.sum(mask_term) / (batch * K))
    tl.store(terms + 1, tl.sum(error) / batch / pixels)
    tl.store(terms + 2, tl.sum(boundary_term) / (batch * L))


@triton.jit
def _dice_gradient(
    logits,  # (B, CLASSES, H, W)
    gradient,  # (B, CLASSES, H, W) out
    target,  # (BLOCK, 1) classes
    alpha,  # (CLASSES,)
    beta,  # (CLASSES,)
    grad_output,  # (1,) gradient of the loss
    image,
    pixel,  # (BLOCK, 1)
    inside,  # (BLOCK, 1)
    SQUARED: tl.constexpr,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    channel = tl.arange(0, PADDED).to(tl.int64)[None, :]
    valid = inside & (channel < CLASSES)
    p = _softmax(logits, image, channel, pixel, valid, CLASSES, DTYPE)
    a = tl.load(alpha + channel, mask=channel < CLASSES, other=0)
    b = tl.load(beta + channel, mask=channel < CLASSES, other=0)
    g = tl.where(target == channel, a, 0) + (p * b if SQUARED else b)
    adjoint = p * (g - tl.sum(p * g, 1)[:, None])
    tl.store(_at(gradient, image, channel, pixel), tl.load(grad_output) * adjoint, mask=valid)


@triton.jit
def objective_bwd_kernel(
    predictions,  # S x (mask logits (B, K, H, W), raw sdf (B, 1, H, W), boundary logits (B, L, H, W))
    gradients,  # the same, out
    targets,  # mask (B, 1, H, W), sdf (B, 1, H, W), boundary (B, 1, H, W)
    alphas,  # (B, C), C = S K + S L
    betas,  # (B, C)
    grad_output,  # (3,) gradients of the terms
    batch,
    pixels,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    L: tl.constexpr,
    L_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    SETS: tl.constexpr = len(predictions)
    program = tl.program_id(0).to(tl.int64)
    image = program % batch
    pixel = (program // batch * BLOCK + tl.arange(0, BLOCK))[:, None]
    inside = pixel < pixels
    alpha = alphas + image * SETS * (K + L)
    beta = betas + image * SETS * (K + L)
    mask = _load(targets[0], image, pixel, inside)
    sdf = _load(targets[1], image, pixel, inside).to(DTYPE)
    boundary = _load(targets[2], image, pixel, inside)
    for s in tl.static_range(SETS):
        mask_logits, raw, boundary_logits = predictions[s]
        mask_gradient, raw_gradient, boundary_gradient = gradients[s]
        _dice_gradient(
            mask_logits, mask_gradient, mask, alpha + s * K, beta + s * K, grad_output,
            image, pixel, inside, True, K, K_PADDED, DTYPE,
        )  # fmt: skip
        first = SETS * K + s * L
        _dice_gradient(
            boundary_logits, boundary_gradient, boundary, alpha + first, beta + first, grad_output + 2,
            image, pixel, inside, False, L, L_PADDED, DTYPE,
        )  # fmt: skip
        value, slope = tanh(_load(raw, image, pixel, inside).to(DTYPE))
        scale = 2 * tl.load(grad_output + 1) / batch / pixels
        tl.store(_at(raw_gradient, image, 0, pixel), scale * (value - sdf) * slope, mask=inside)


def forward(
    predictions: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms (3,), alpha and beta (B, C) in `dtype`, float32 or float64, which is also that of the arithmetic.

    predictions: S x (mask logits (B, K, H, W), raw sdf (B, 1, H, W), boundary logits (B, L, H, W)); targets: mask, sdf
    and boundary, each (B, 1, H, W). Every plane has one stride from pixel to pixel.
    """
    batch, pixels, classes = _sizes(predictions)
    options = _launch_options(predictions, dtype)
    tiles = triton.cdiv(pixels, options["BLOCK"])
    sets, columns = len(predictions), len(predictions) * sum(classes)
    like = {"dtype": dtype, "device": targets[0].device}
    overlaps, masses = (torch.empty(tiles, batch, columns, **like) for _ in range(2))
    errors = torch.empty(tiles, batch, sets, **like)
    terms = torch.empty(3, **like)
    alphas, betas = (torch.empty(batch, columns, **like) for _ in range(2))
    with torch.cuda.device_of(terms):
        if tiles * batch:
            objective_sums_fwd_kernel[(tiles * batch,)](
                tuple(map(_planes, predictions)), _planes(targets), overlaps, masses, errors, batch, pixels, **options
            )
        objective_finish_fwd_kernel[(1,)](
            overlaps, masses, errors, terms, alphas, betas, tiles, batch, pixels, sets, *classes,
            TILES=FINISH_TILES, COLUMNS=FINISH_COLUMNS, DTYPE=options["DTYPE"], num_warps=FINISH_WARPS, maxnreg=128,
        )  # fmt: skip
    return terms, alphas, betas


def backward(
    grad_output: Tensor,
    predictions: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor],
    alphas: Tensor,
    betas: Tensor,
) -> list[list[Tensor]]:
    """Gradients of the predictions, in their layouts and dtypes.

    grad_output: (3,); predictions and targets: the arguments of `forward`; alphas and betas: its results.
    """
    batch, pixels, _ = _sizes(predictions)
    options = _launch_options(predictions, alphas.dtype)
    gradients = [[torch.empty_like(x) for x in prediction] for prediction in predictions]
    programs = triton.cdiv(pixels, options["BLOCK"]) * batch
    if programs:
        with torch.cuda.device_of(grad_output):
            objective_bwd_kernel[(programs,)](
                tuple(map(_planes, predictions)), tuple(map(_planes, gradients)), _planes(targets),
                alphas, betas, grad_output.contiguous(), batch, pixels, **options,
            )  # fmt: skip
    return gradients


def _planes(tensors: Sequence[Tensor]) -> tuple[Planes, ...]:
    """Addresses and strides of tensors. If a plane is one pixel wide, the next pixel is in the next row.

    The stride between pixels is a compile-time constant, so that one load reads all classes of a channels-last pixel.
    """
    return tuple(
        Planes(x, x.stride(0), x.stride(1), tl.constexpr(x.stride(3 if x.shape[3] > 1 else 2))) for x in tensors
    )


def _sizes(predictions: Sequence[Sequence[Tensor]]) -> tuple[int, int, tuple[int, int]]:
    """Number of images, pixels of an image, and classes of mask and boundary."""
    mask_logits, _, boundary_logits = predictions[0]
    batch, classes, height, width = mask_logits.shape
    return batch, height * width, (classes, boundary_logits.shape[1])


def _launch_options(predictions: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> dict[str, object]:
    """Options of the sums and backward kernels. A tile has fewer pixels with more than eight classes."""
    _, _, classes = _sizes(predictions)
    padded = [triton.next_power_of_2(count) for count in classes]
    vector = VECTOR_BYTES // max(x.element_size() for prediction in predictions for x in prediction)
    return {
        "K": classes[0],
        "K_PADDED": padded[0],
        "L": classes[1],
        "L_PADDED": padded[1],
        "BLOCK": max(WARPS * 32 * vector * 8 // max(*padded, 8), 8),
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
        "maxnreg": 255,  # the limit; by default ptxas spills a few words so that more programs fit
    }
