"""Batch normalization and ReLU, training with split statistics and evaluation; forward and backward.

The B images are G equal groups of consecutive images. With n values per group and channel, and sums over them,

    xhat = (x - mean) / sqrt(variance + eps)      z = weight xhat + bias      y = max(z, 0)
    dz = dy if z > 0, else 0                      dbias = sum dz              dweight = sum dz xhat    (over all groups)
    dx = weight / sqrt(variance + eps) (dz - (sum dz + xhat sum dz xhat) / n)

Forward reads x twice and writes y: `batch_norm_relu_sums_fwd_kernel` writes the mean and the sum of squared differences
from it (M2) of every chunk of pixels, `batch_norm_relu_merge_fwd_kernel` merges the chunks of a group,
`batch_norm_relu_fwd_kernel` writes y. Backward reads x and dy twice and writes dx, in the same three steps; it
recomputes xhat and z. Nothing is added atomically, so every run gives the same bits.

Large means cost no precision: the sums of a chunk are of x - s and (x - s)^2, where s is the mean of its first tile.
With T tiles of equal size, (mean - s)^2 <= (T - 1) variance, so M2 = sum (x - s)^2 - (sum (x - s))^2 / n loses at most
a factor T <= 16 of precision. Means of chunks are relative to the first pixel of the group, which is less than sqrt(n)
deviations from the mean. The merge reads them twice, because they are few:

    mean = sum n_i mean_i / n                     M2 = sum M2_i + n_i (mean_i - mean)^2              (Chan et al. 1979)

Tiles and chunks: see _tiling.py. The partial sums of a chunk are 16 bytes per channel, written and read. In bfloat16
that is 1 % of the traffic at (8, 64, 256, 256), 4 % with chunks of 64 pixels, and more only for smaller images or
groups. The last kernel of each pass takes the chunks in reverse order, because those read last may still be in the L2
cache.

Arithmetic is in float32. Formulas of the merge: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances, 1979.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiling import (
    chunk_sizes,
    grid_of,
    load_channels,
    load_chunks,
    load_reference,
    load_tile,
    partial_sums,
    pixels_before,
    place,
    store_chunk,
    store_tile,
    tiles_of,
    tiling_of,
)

WARPS = 4
# A step of the merge kernels: 32 bytes of each of 512 chunks, 8 loads in flight per thread.
MERGE_CHUNKS = 512
MERGE_CHANNELS = 8
MERGE_WARPS = 16
UPDATE_CHANNELS = 128


class Parameters(NamedTuple):
    """The affine map of each channel."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    mean: Tensor  # (groups, C) float32
    inverse_deviation: Tensor  # (groups, C) float32


@triton.jit
def _load_parameters(parameters, group, channel, tiling):
    """Weight, bias, mean and inverse deviation, each (1, TILE_CHANNELS)."""
    row = group * tiling.CHANNELS
    return (
        load_channels(parameters.weight, channel, tiling),
        load_channels(parameters.bias, channel, tiling),
        load_channels(parameters.mean + row, channel, tiling),
        load_channels(parameters.inverse_deviation + row, channel, tiling),
    )


@triton.jit
def _normalize(x, weight, bias, mean, inverse_deviation):
    """xhat and z. Explicit fma: z rounds alike in forward and backward, so both have the same ReLU mask."""
    xhat = (x - mean) * inverse_deviation
    return xhat, tl.fma(weight, xhat, bias)


@triton.jit
def batch_norm_relu_sums_fwd_kernel(
    x,  # (B, C, H, W)
    means,  # (groups, chunks, C) float32 out: minus reference
    squares,  # (groups, chunks, C) float32 out: M2
    references,  # (groups, C) float32 out: the first pixel of the group
    tiling,
):
    group, chunk, channel = place(tl.program_id(0), tiling)
    first, end = tiles_of(chunk, tiling)
    before = pixels_before(first, tiling)
    value, inside = load_tile(x, group, first, channel, tiling)
    shift = tl.sum(value, 0) / (pixels_before(first + 1, tiling) - before)
    difference = tl.where(inside, value - shift[None, :], 0)
    total = difference
    square = difference * difference
    for tile in range(first + 1, end):
        value, inside = load_tile(x, group, tile, channel, tiling)
        difference = tl.where(inside, value - shift[None, :], 0)
        total += difference
        square += difference * difference
    total = tl.sum(total, 0)
    mean = total / (pixels_before(end, tiling) - before)  # minus shift
    square = tl.sum(square, 0) - total * mean
    reference = load_reference(x, group, channel, tiling)
    store_chunk(means, shift - reference + mean, group, chunk, channel, tiling)
    store_chunk(squares, tl.where(square < 0, 0, square), group, chunk, channel, tiling)
    if chunk == 0:
        c = channel + tl.arange(0, tiling.TILE_CHANNELS)
        tl.store(references + group * tiling.CHANNELS + c, reference, mask=c < tiling.CHANNELS)


@triton.jit
def batch_norm_relu_merge_fwd_kernel(
    means,  # (groups, chunks, C): minus reference
    squares,  # (groups, chunks, C)
    mean,  # (groups, C) in: reference, out: mean
    inverse_deviation,  # (groups, C) out
    eps,
    tiling,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(tiling.CHANNELS, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    pixels = (tl.cast(tiling.images, tl.int64) * tiling.pixels).to(tl.float32)
    total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for start in range(0, tiling.chunks, CHUNKS):
        total += chunk_sizes(start, tiling, CHUNKS) * load_chunks(means, group, start, c, tiling, CHUNKS)
    center = tl.sum(total, 0) / pixels
    square = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for start in range(0, tiling.chunks, CHUNKS):
        difference = load_chunks(means, group, start, c, tiling, CHUNKS) - center[None, :]
        square += load_chunks(squares, group, start, c, tiling, CHUNKS)
        square += chunk_sizes(start, tiling, CHUNKS) * difference * difference
    variance = tl.sum(square, 0) / pixels
    out = group * tiling.CHANNELS + c
    reference = tl.load(mean + out, mask=c < tiling.CHANNELS, other=0)
    tl.store(mean + out, reference + center, mask=c < tiling.CHANNELS)
    tl.store(inverse_deviation + out, 1 / tl.sqrt_rn(variance + eps), mask=c < tiling.CHANNELS)


@triton.jit
def batch_norm_update_running_kernel(
    running_mean,  # (C,) in and out
    running_var,  # (C,) in and out
    mean,  # (groups, C)
    inverse_deviation,  # (groups, C)
    momentum,
    eps,
    unbiased,  # values / (values - 1)
    groups,
    channels,
    COLUMNS: tl.constexpr,
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < channels
    moving_mean = tl.load(running_mean + c, mask=inside, other=0)
    moving_var = tl.load(running_var + c, mask=inside, other=0)
    for group in range(groups):
        center = tl.load(mean + group * channels + c, mask=inside, other=0)
        inverse = tl.load(inverse_deviation + group * channels + c, mask=inside, other=1)
        variance = 1 / (inverse * inverse) - eps
        variance = tl.where(variance < 0, 0, variance) * unbiased  # NaN stays NaN
        moving_mean = momentum * center + (1 - momentum) * moving_mean
        moving_var = momentum * variance + (1 - momentum) * moving_var
    tl.store(running_mean + c, moving_mean, mask=inside)
    tl.store(running_var + c, moving_var, mask=inside)


@triton.jit
def batch_norm_relu_fwd_kernel(
    x,  # (B, C, H, W)
    y,  # (B, C, H, W) out
    parameters,
    tiling,
):
    group, chunk, channel = place(tl.num_programs(0) - 1 - tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    first, end = tiles_of(chunk, tiling)
    for tile in range(first, end):
        value, _ = load_tile(x, group, tile, channel, tiling)
        _, z = _normalize(value, weight, bias, mean, inverse_deviation)
        store_tile(y, tl.where(z < 0, 0, z), group, tile, channel, tiling)  # NaN stays NaN


@triton.jit
def _load_gradient(grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling):
    """dz and xhat of a tile; dz is 0 outside. Where z is NaN, the gradient passes, as in PyTorch."""
    value, _ = load_tile(x, group, tile, channel, tiling)
    grad, _ = load_tile(grad_output, group, tile, channel, tiling)
    xhat, z = _normalize(value, weight, bias, mean, inverse_deviation)
    return tl.where(z <= 0, 0, grad), xhat


@triton.jit
def batch_norm_relu_sums_bwd_kernel(
    grad_output,  # (B, C, H, W)
    x,  # (B, C, H, W)
    parameters,
    sums,  # (groups, chunks, C) float32 out: sum dz
    products,  # (groups, chunks, C) float32 out: sum dz xhat
    tiling,
):
    group, chunk, channel = place(tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    first, end = tiles_of(chunk, tiling)
    total = tl.zeros([tiling.TILE_PIXELS, tiling.TILE_CHANNELS], tl.float32)
    product = tl.zeros([tiling.TILE_PIXELS, tiling.TILE_CHANNELS], tl.float32)
    for tile in range(first, end):
        dz, xhat = _load_gradient(
            grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling
        )  # fmt: skip
        total += dz
        product += dz * xhat
    store_chunk(sums, tl.sum(total, 0), group, chunk, channel, tiling)
    store_chunk(products, tl.sum(product, 0), group, chunk, channel, tiling)


@triton.jit
def batch_norm_relu_merge_bwd_kernel(
    sums,  # (groups, chunks, C)
    products,  # (groups, chunks, C)
    mean_sums,  # (groups, C) out: sum dz / n
    mean_products,  # (groups, C) out: sum dz xhat / n
    grad_weight,  # (C,) out
    grad_bias,  # (C,) out
    groups,
    tiling,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = c < tiling.CHANNELS
    pixels = (tl.cast(tiling.images, tl.int64) * tiling.pixels).to(tl.float32)
    all_sums = tl.zeros([COLUMNS], tl.float32)
    all_products = tl.zeros([COLUMNS], tl.float32)
    for group in range(tl.cast(groups, tl.int64)):
        total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
        product = tl.zeros([CHUNKS, COLUMNS], tl.float32)
        for start in range(0, tiling.chunks, CHUNKS):
            total += load_chunks(sums, group, start, c, tiling, CHUNKS)
            product += load_chunks(products, group, start, c, tiling, CHUNKS)
        group_sum, group_product = tl.sum(total, 0), tl.sum(product, 0)
        tl.store(mean_sums + group * tiling.CHANNELS + c, group_sum / pixels, mask=valid)
        tl.store(mean_products + group * tiling.CHANNELS + c, group_product / pixels, mask=valid)
        all_sums += group_sum
        all_products += group_product
    tl.store(grad_bias + c, all_sums, mask=valid)
    tl.store(grad_weight + c, all_products, mask=valid)


@triton.jit
def batch_norm_relu_bwd_kernel(
    grad_output,  # (B, C, H, W)
    x,  # (B, C, H, W)
    grad_x,  # (B, C, H, W) out
    parameters,
    mean_sums,  # (groups, C)
    mean_products,  # (groups, C)
    tiling,
):
    group, chunk, channel = place(tl.num_programs(0) - 1 - tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    mean_sum = load_channels(mean_sums + group * tiling.CHANNELS, channel, tiling)
    mean_product = load_channels(mean_products + group * tiling.CHANNELS, channel, tiling)
    first, end = tiles_of(chunk, tiling)
    for tile in range(first, end):
        dz, xhat = _load_gradient(
            grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling
        )  # fmt: skip
        dx = weight * inverse_deviation * (dz - mean_sum - xhat * mean_product)
        store_tile(grad_x, dx, group, tile, channel, tiling)


def batch_norm_relu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y = relu(batch_norm(x)) with the statistics of each group; y, mean and 1 / sqrt(variance + eps).

    x: (B, C, H, W), float32, bfloat16 or float16, contiguous or channels-last, not empty, B a multiple of `groups`;
    weight, bias: (C,). y is as x. The statistics are (groups, C) float32, with the biased variance.
    """
    y = torch.empty_like(x)
    mean, inverse_deviation = (x.new_empty(groups, x.shape[1], dtype=torch.float32) for _ in range(2))
    tiling = tiling_of(x, groups)
    means, squares = partial_sums(x, groups, tiling)
    with torch.cuda.device_of(x):
        grid = grid_of(groups, tiling)
        batch_norm_relu_sums_fwd_kernel[grid](x, means, squares, mean, tiling, num_warps=WARPS)
        batch_norm_relu_merge_fwd_kernel[(groups * triton.cdiv(x.shape[1], MERGE_CHANNELS),)](
            means, squares, mean, inverse_deviation, eps, tiling,
            CHUNKS=MERGE_CHUNKS, COLUMNS=MERGE_CHANNELS, num_warps=MERGE_WARPS,
        )  # fmt: skip
        parameters = Parameters(weight, bias, mean, inverse_deviation)
        batch_norm_relu_fwd_kernel[grid](x, y, parameters, tiling, num_warps=WARPS)
    return y, mean, inverse_deviation


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    momentum: float,
    eps: float,
    values: int,
) -> None:
    """Move running statistics (C,) in place toward those of each group, (groups, C), in turn; all float32.

    values: number of values of a channel in a group, at least 2.
    """
    groups, channels = mean.shape
    with torch.cuda.device_of(mean):
        batch_norm_update_running_kernel[(triton.cdiv(channels, UPDATE_CHANNELS),)](
            running_mean, running_var, mean, inverse_deviation, momentum, eps, values / (values - 1), groups, channels,
            COLUMNS=UPDATE_CHANNELS, num_warps=WARPS,
        )  # fmt: skip


def batch_norm_relu_eval(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """y = relu(weight (x - mean) inverse_deviation + bias); mean and inverse_deviation are (C,) or (groups, C).

    Shapes of the others, dtypes and layouts as in `batch_norm_relu_fwd`.
    """
    y = torch.empty_like(x)
    if x.numel():
        groups = mean.numel() // x.shape[1]
        tiling = tiling_of(x, groups)
        with torch.cuda.device_of(x):
            parameters = Parameters(weight, bias, mean, inverse_deviation)
            batch_norm_relu_fwd_kernel[grid_of(groups, tiling)](x, y, parameters, tiling, num_warps=WARPS)
    return y


def batch_norm_relu_bwd(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype and layout, and of weight and bias, (C,) float32.

    grad_output: (B, C, H, W) in the dtype of x; other arguments: those of `batch_norm_relu_fwd` and its statistics.
    """
    grad_x = torch.empty_like(x)
    tiling = tiling_of(x, groups)
    sums, products = partial_sums(x, groups, tiling)
    mean_sums, mean_products = (sums.new_empty(groups, x.shape[1]) for _ in range(2))
    grad_weight, grad_bias = (sums.new_empty(x.shape[1]) for _ in range(2))
    parameters = Parameters(weight, bias, mean, inverse_deviation)
    with torch.cuda.device_of(x):
        grid = grid_of(groups, tiling)
        batch_norm_relu_sums_bwd_kernel[grid](grad_output, x, parameters, sums, products, tiling, num_warps=WARPS)
        batch_norm_relu_merge_bwd_kernel[(triton.cdiv(x.shape[1], MERGE_CHANNELS),)](
            sums, products, mean_sums, mean_products, grad_weight, grad_bias, groups, tiling,
            CHUNKS=MERGE_CHUNKS, COLUMNS=MERGE_CHANNELS, num_warps=MERGE_WARPS,
        )  # fmt: skip
        batch_norm_relu_bwd_kernel[grid](
            grad_output, x, grad_x, parameters, mean_sums, mean_products, tiling, num_warps=WARPS
        )
    return grad_x, grad_weight, grad_bias
