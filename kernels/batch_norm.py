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

A tile is 8 KiB of x, four loads of 16 bytes for each of 128 threads: in channels-last tensors 128 bytes of channels by
a run of pixels of the group; in NCHW tensors a run of pixels of one image, by several channels if images are small.
Accesses have 16 bytes if C (channels-last) or H W (NCHW) is a multiple of 8, 4 in float32, and 16 for H W. A
program takes up to 16 tiles, so that at least `PROGRAMS` programs remain. The partial sums are 16 bytes per chunk and
channel, written and read, which is 1 % of the traffic at (8, 64, 256, 256) in bfloat16 and at most 4 % with chunks of
one tile of 64 pixels. The last kernel of each pass takes the chunks in reverse order, because those read last may still
be in the L2 cache. One axis of the grid counts all programs, so the batch has no limit.

Arithmetic is in float32. Formulas of the merge: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances, 1979.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
TILE_BYTES = 8192
ROW_BYTES = 128  # of the channels of a pixel, in channels-last tensors
PROGRAMS = 2048  # about two waves of the largest GPUs; with fewer tiles per program, the merge would take longer
MOST_TILES = 16
# A step of the merge kernels: 32 bytes of each of 512 chunks, 8 loads in flight per thread.
MERGE_CHUNKS = 512
MERGE_CHANNELS = 8
MERGE_WARPS = 16


class Tiling(NamedTuple):
    """How programs divide a tensor (groups x images, C, pixels), dense, with channels or pixels last.

    In channels-last tensors, all images of a group are one: their pixels follow each other.
    """

    images: int  # of a group
    pixels: int  # of an image
    chunks: int  # of a group
    CHANNELS: tl.constexpr  # C
    CHANNELS_LAST: tl.constexpr
    TILE_PIXELS: tl.constexpr
    TILE_CHANNELS: tl.constexpr
    TILES: tl.constexpr  # of a chunk


class Parameters(NamedTuple):
    """The affine map of each channel."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    mean: Tensor  # (groups, C) float32
    inverse_deviation: Tensor  # (groups, C) float32


@triton.jit
def _place(program, tiling):
    """Group, chunk of the group, and first channel of a program; programs of the same pixels follow each other.

    Group and channel have 64 bits, like all that is multiplied by sizes of images; counts of tiles and chunks have 32.
    """
    blocks = tl.cdiv(tiling.CHANNELS, tiling.TILE_CHANNELS)
    chunk = program // blocks
    channel = (program % blocks * tiling.TILE_CHANNELS).to(tl.int64)
    return (chunk // tiling.chunks).to(tl.int64), chunk % tiling.chunks, channel


@triton.jit
def _tiles(chunk, tiling):
    """First tile of a chunk, and the one after its last."""
    end = tiling.images * tl.cdiv(tiling.pixels, tiling.TILE_PIXELS)
    return tl.minimum(chunk * tiling.TILES, end), tl.minimum((chunk + 1) * tiling.TILES, end)


@triton.jit
def _pixels_before(tile, tiling):
    """Number of pixels of the group before a tile; the last tile of an image may be smaller than others."""
    per_image = tl.cdiv(tiling.pixels, tiling.TILE_PIXELS)
    return (tile // per_image).to(tl.int64) * tiling.pixels + tile % per_image * tiling.TILE_PIXELS


@triton.jit
def _tile(group, tile, channel, tiling):
    """Offset of a tile, offsets (TILE_PIXELS, TILE_CHANNELS) of its elements from there, and which are inside."""
    per_image = tl.cdiv(tiling.pixels, tiling.TILE_PIXELS)
    image = group * tiling.images + tile // per_image
    pixel = (tile % per_image).to(tl.int64) * tiling.TILE_PIXELS
    p = tl.arange(0, tiling.TILE_PIXELS)[:, None]
    c = tl.arange(0, tiling.TILE_CHANNELS)[None, :]
    inside = (p < tiling.pixels - pixel) & (c < tiling.CHANNELS - channel)
    start = image * tiling.CHANNELS * tiling.pixels
    if tiling.CHANNELS_LAST:
        return start + pixel * tiling.CHANNELS + channel, p * tiling.CHANNELS + c, inside
    return start + channel * tiling.pixels + pixel, c * tiling.pixels + p, inside


@triton.jit
def _load(x, group, tile, channel, tiling):
    """Values of a tile as float32, 0 outside, and which are inside."""
    start, offsets, inside = _tile(group, tile, channel, tiling)
    return tl.load(x + start + offsets, mask=inside, other=0).to(tl.float32), inside


@triton.jit
def _store(x, values, group, tile, channel, tiling):
    start, offsets, inside = _tile(group, tile, channel, tiling)
    tl.store(x + start + offsets, values, mask=inside)


@triton.jit
def _load_channels(parameter, channel, tiling):
    """(1, TILE_CHANNELS) of a parameter (C,)."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    return tl.load(parameter + c, mask=c < tiling.CHANNELS, other=0).to(tl.float32)[None, :]


@triton.jit
def _store_chunk(partial, sums, group, chunk, channel, tiling):
    """Write sums (TILE_CHANNELS,) to partial (groups, chunks, C)."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    row = (group * tiling.chunks + chunk) * tiling.CHANNELS
    tl.store(partial + row + c, sums, mask=c < tiling.CHANNELS)


@triton.jit
def _load_parameters(parameters, group, channel, tiling):
    """Weight, bias, mean and inverse deviation, each (1, TILE_CHANNELS)."""
    row = group * tiling.CHANNELS
    return (
        _load_channels(parameters.weight, channel, tiling),
        _load_channels(parameters.bias, channel, tiling),
        _load_channels(parameters.mean + row, channel, tiling),
        _load_channels(parameters.inverse_deviation + row, channel, tiling),
    )


@triton.jit
def _normalize(x, weight, bias, mean, inverse_deviation):
    """xhat and z. Explicit fma: z rounds alike in forward and backward, so both have the same ReLU mask."""
    xhat = (x - mean) * inverse_deviation
    return xhat, tl.fma(weight, xhat, bias)


@triton.jit
def _load_reference(x, group, channel, tiling):
    """(TILE_CHANNELS,) first pixel of a group."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    offsets = group * tiling.images * tiling.CHANNELS * tiling.pixels + c * (
        1 if tiling.CHANNELS_LAST else tiling.pixels
    )
    return tl.load(x + offsets, mask=c < tiling.CHANNELS, other=0).to(tl.float32)


@triton.jit
def batch_norm_relu_sums_fwd_kernel(
    x,  # (B, C, H, W)
    means,  # (groups, chunks, C) float32 out: minus reference
    squares,  # (groups, chunks, C) float32 out: M2
    references,  # (groups, C) float32 out: the first pixel of the group
    tiling,
):
    group, chunk, channel = _place(tl.program_id(0), tiling)
    first, end = _tiles(chunk, tiling)
    before = _pixels_before(first, tiling)
    value, inside = _load(x, group, first, channel, tiling)
    shift = tl.sum(value, 0) / (_pixels_before(first + 1, tiling) - before)
    difference = tl.where(inside, value - shift[None, :], 0)
    total = difference
    square = difference * difference
    for tile in range(first + 1, end):
        value, inside = _load(x, group, tile, channel, tiling)
        difference = tl.where(inside, value - shift[None, :], 0)
        total += difference
        square += difference * difference
    total = tl.sum(total, 0)
    mean = total / (_pixels_before(end, tiling) - before)  # minus shift
    square = tl.sum(square, 0) - total * mean
    reference = _load_reference(x, group, channel, tiling)
    _store_chunk(means, shift - reference + mean, group, chunk, channel, tiling)
    _store_chunk(squares, tl.where(square < 0, 0, square), group, chunk, channel, tiling)
    if chunk == 0:
        c = channel + tl.arange(0, tiling.TILE_CHANNELS)
        tl.store(references + group * tiling.CHANNELS + c, reference, mask=c < tiling.CHANNELS)


@triton.jit
def _load_chunks(partial, group, start, c, tiling, CHUNKS: tl.constexpr):
    """Rows start, start + 1, ... (CHUNKS, channels) of partial (groups, chunks, C), 0 outside."""
    chunk = (start + tl.arange(0, CHUNKS))[:, None]
    valid = (chunk < tiling.chunks) & (c < tiling.CHANNELS)[None, :]
    row = (group * tiling.chunks + chunk) * tiling.CHANNELS
    return tl.load(partial + row + c[None, :], mask=valid, other=0)


@triton.jit
def _chunk_sizes(start, tiling, CHUNKS: tl.constexpr):
    """Pixels (CHUNKS, 1) of the chunks start, start + 1, ..., as float32, 0 outside."""
    first, end = _tiles(start + tl.arange(0, CHUNKS), tiling)
    return (_pixels_before(end, tiling) - _pixels_before(first, tiling)).to(tl.float32)[:, None]


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
        total += _chunk_sizes(start, tiling, CHUNKS) * _load_chunks(means, group, start, c, tiling, CHUNKS)
    center = tl.sum(total, 0) / pixels
    square = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for start in range(0, tiling.chunks, CHUNKS):
        difference = _load_chunks(means, group, start, c, tiling, CHUNKS) - center[None, :]
        square += _load_chunks(squares, group, start, c, tiling, CHUNKS)
        square += _chunk_sizes(start, tiling, CHUNKS) * difference * difference
    variance = tl.sum(square, 0) / pixels
    out = group * tiling.CHANNELS + c
    reference = tl.load(mean + out, mask=c < tiling.CHANNELS, other=0)
    tl.store(mean + out, reference + center, mask=c < tiling.CHANNELS)
    tl.store(inverse_deviation + out, 1 / tl.sqrt_rn(variance + eps), mask=c < tiling.CHANNELS)


@triton.jit
def batch_norm_relu_fwd_kernel(
    x,  # (B, C, H, W)
    y,  # (B, C, H, W) out
    parameters,
    tiling,
):
    group, chunk, channel = _place(tl.num_programs(0) - 1 - tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    first, end = _tiles(chunk, tiling)
    for tile in range(first, end):
        value, _ = _load(x, group, tile, channel, tiling)
        _, z = _normalize(value, weight, bias, mean, inverse_deviation)
        _store(y, tl.where(z < 0, 0, z), group, tile, channel, tiling)  # NaN stays NaN


@triton.jit
def _load_gradient(grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling):
    """dz and xhat of a tile; dz is 0 outside."""
    value, _ = _load(x, group, tile, channel, tiling)
    grad, _ = _load(grad_output, group, tile, channel, tiling)
    xhat, z = _normalize(value, weight, bias, mean, inverse_deviation)
    return tl.where(z > 0, grad, 0), xhat


@triton.jit
def batch_norm_relu_sums_bwd_kernel(
    grad_output,  # (B, C, H, W)
    x,  # (B, C, H, W)
    parameters,
    sums,  # (groups, chunks, C) float32 out: sum dz
    products,  # (groups, chunks, C) float32 out: sum dz xhat
    tiling,
):
    group, chunk, channel = _place(tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    first, end = _tiles(chunk, tiling)
    total = tl.zeros([tiling.TILE_PIXELS, tiling.TILE_CHANNELS], tl.float32)
    product = tl.zeros([tiling.TILE_PIXELS, tiling.TILE_CHANNELS], tl.float32)
    for tile in range(first, end):
        dz, xhat = _load_gradient(
            grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling
        )  # fmt: skip
        total += dz
        product += dz * xhat
    _store_chunk(sums, tl.sum(total, 0), group, chunk, channel, tiling)
    _store_chunk(products, tl.sum(product, 0), group, chunk, channel, tiling)


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
            total += _load_chunks(sums, group, start, c, tiling, CHUNKS)
            product += _load_chunks(products, group, start, c, tiling, CHUNKS)
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
    group, chunk, channel = _place(tl.num_programs(0) - 1 - tl.program_id(0), tiling)
    weight, bias, mean, inverse_deviation = _load_parameters(parameters, group, channel, tiling)
    mean_sum = _load_channels(mean_sums + group * tiling.CHANNELS, channel, tiling)
    mean_product = _load_channels(mean_products + group * tiling.CHANNELS, channel, tiling)
    first, end = _tiles(chunk, tiling)
    for tile in range(first, end):
        dz, xhat = _load_gradient(
            grad_output, x, group, tile, channel, weight, bias, mean, inverse_deviation, tiling
        )  # fmt: skip
        dx = weight * inverse_deviation * (dz - mean_sum - xhat * mean_product)
        _store(grad_x, dx, group, tile, channel, tiling)


def batch_norm_relu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y = relu(batch_norm(x)) with the statistics of each group; y, mean and 1 / sqrt(variance + eps).

    x: (B, C, H, W), float32, bfloat16 or float16, B a multiple of `groups`; weight, bias: (C,). y has the dtype of x
    and its layout, NCHW or channels-last; of any other layout it is NCHW. The statistics are (groups, C) float32, with
    the biased variance; NaN if there are no pixels.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    mean, inverse_deviation = (x.new_full((groups, x.shape[1]), torch.nan, dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, mean, inverse_deviation
    tiling = _tiling(x, groups)
    means, squares = _partial_sums(x, groups, tiling)
    with torch.cuda.device_of(x):
        grid = _grid(groups, tiling)
        batch_norm_relu_sums_fwd_kernel[grid](x, means, squares, mean, tiling, num_warps=WARPS)
        batch_norm_relu_merge_fwd_kernel[(groups * triton.cdiv(x.shape[1], MERGE_CHANNELS),)](
            means, squares, mean, inverse_deviation, eps, tiling,
            CHUNKS=MERGE_CHUNKS, COLUMNS=MERGE_CHANNELS, num_warps=MERGE_WARPS,
        )  # fmt: skip
        parameters = Parameters(weight, bias, mean, inverse_deviation)
        batch_norm_relu_fwd_kernel[grid](x, y, parameters, tiling, num_warps=WARPS)
    return y, mean, inverse_deviation


def batch_norm_relu_eval(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """y = relu(weight (x - mean) inverse_deviation + bias) of x (B, C, H, W) and four parameters (C,).

    Dtypes and layouts as in `batch_norm_relu_fwd`.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    if x.numel():
        tiling = _tiling(x, 1)
        with torch.cuda.device_of(x):
            parameters = Parameters(weight, bias, mean, inverse_deviation)
            batch_norm_relu_fwd_kernel[_grid(1, tiling)](x, y, parameters, tiling, num_warps=WARPS)
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
    x = _dense(x)
    grad_output = grad_output.contiguous(memory_format=_layout(x))
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, *(x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    tiling = _tiling(x, groups)
    sums, products = _partial_sums(x, groups, tiling)
    mean_sums, mean_products = (sums.new_empty(groups, x.shape[1]) for _ in range(2))
    grad_weight, grad_bias = (sums.new_empty(x.shape[1]) for _ in range(2))
    parameters = Parameters(weight, bias, mean, inverse_deviation)
    with torch.cuda.device_of(x):
        grid = _grid(groups, tiling)
        batch_norm_relu_sums_bwd_kernel[grid](grad_output, x, parameters, sums, products, tiling, num_warps=WARPS)
        batch_norm_relu_merge_bwd_kernel[(triton.cdiv(x.shape[1], MERGE_CHANNELS),)](
            sums, products, mean_sums, mean_products, grad_weight, grad_bias, groups, tiling,
            CHUNKS=MERGE_CHUNKS, COLUMNS=MERGE_CHANNELS, num_warps=MERGE_WARPS,
        )  # fmt: skip
        batch_norm_relu_bwd_kernel[grid](
            grad_output, x, grad_x, parameters, mean_sums, mean_products, tiling, num_warps=WARPS
        )
    return grad_x, grad_weight, grad_bias


def _layout(x: Tensor) -> torch.memory_format:
    """Channels-last if x is; tensors with one channel or one pixel per image are both, and count as channels-last."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_layout(x))


def _tiling(x: Tensor, groups: int) -> Tiling:
    """The tiling of a dense tensor (B, C, H, W)."""
    batch, channels, height, width = x.shape
    images, pixels = batch // groups, height * width
    elements = TILE_BYTES // x.element_size()
    padded = triton.next_power_of_2(channels)
    channels_last = _layout(x) == torch.channels_last
    if channels_last:
        images, pixels = 1, images * pixels
        tile_channels = min(padded, ROW_BYTES // x.element_size())
        tile_pixels = elements // tile_channels
    else:
        tile_pixels = min(triton.next_power_of_2(pixels), elements)
        tile_channels = min(padded, elements // tile_pixels)
    tiles = images * triton.cdiv(pixels, tile_pixels)
    programs = groups * tiles * triton.cdiv(channels, tile_channels)
    per_chunk = min(triton.next_power_of_2(programs // PROGRAMS + 1) // 2 or 1, MOST_TILES)
    constants = channels, channels_last, tile_pixels, tile_channels, per_chunk
    return Tiling(images, pixels, triton.cdiv(tiles, per_chunk), *map(tl.constexpr, constants))


def _grid(groups: int, tiling: Tiling) -> tuple[int]:
    blocks = triton.cdiv(tiling.CHANNELS.value, tiling.TILE_CHANNELS.value)
    return (groups * tiling.chunks * blocks,)


def _partial_sums(x: Tensor, groups: int, tiling: Tiling) -> list[Tensor]:
    """Two tensors (groups, chunks, C) float32."""
    return [x.new_empty(groups, tiling.chunks, x.shape[1], dtype=torch.float32) for _ in range(2)]
