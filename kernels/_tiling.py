"""Divide an image tensor into tiles, and the tiles into chunks that one program reduces; for batch_norm.py.

A tile is 8 KiB of x, four loads of 16 bytes for each of 128 threads: in channels-last tensors 128 bytes of channels by
a run of pixels of the group; in NCHW tensors a run of pixels of one image, by several channels if images are small.
Accesses have 16 bytes if 8 (float32: 4) divides C (channels-last) or 16 divides H W (NCHW). A program takes a
chunk of up to 16 tiles, but fewer if there would be less than `PROGRAMS` programs.

Sizes and offsets of tensors have 64 bits, counts of tiles and programs 32. One axis of the grid counts all programs, so
the batch has no limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8192
ROW_BYTES = 128  # of the channels of a pixel, in channels-last tensors
PROGRAMS = 2048  # about two waves of the largest GPUs; the more programs, the longer the merge of their sums
MOST_TILES = 16


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


@triton.jit
def place(program, tiling):
    """Group, chunk of the group, and first channel of a program; programs of the same pixels follow each other.

    Group and channel have 64 bits, like all that is multiplied by sizes of images; counts of tiles and chunks have 32.
    """
    blocks = tl.cdiv(tiling.CHANNELS, tiling.TILE_CHANNELS)
    chunk = program // blocks
    channel = (program % blocks * tiling.TILE_CHANNELS).to(tl.int64)
    return (chunk // tiling.chunks).to(tl.int64), chunk % tiling.chunks, channel


@triton.jit
def tiles_of(chunk, tiling):
    """First tile of a chunk, and the one after its last."""
    end = tiling.images * tl.cdiv(tiling.pixels, tiling.TILE_PIXELS)
    return tl.minimum(chunk * tiling.TILES, end), tl.minimum((chunk + 1) * tiling.TILES, end)


@triton.jit
def pixels_before(tile, tiling):
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
    channels = tl.cast(tiling.CHANNELS, tl.int64)  # Triton 3.8's interpreter cannot compare with constexpr - tensor
    inside = (p < tiling.pixels - pixel) & (c < channels - channel)
    pixel_stride = tiling.CHANNELS if tiling.CHANNELS_LAST else 1
    channel_stride = 1 if tiling.CHANNELS_LAST else tiling.pixels
    start = image * tiling.CHANNELS * tiling.pixels + pixel * pixel_stride + channel * channel_stride
    return start, p * pixel_stride + c * channel_stride, inside


@triton.jit
def load_tile(x, group, tile, channel, tiling):
    """Values of a tile as float32, 0 outside, and which are inside."""
    start, offsets, inside = _tile(group, tile, channel, tiling)
    return tl.load(x + start + offsets, mask=inside, other=0).to(tl.float32), inside


@triton.jit
def store_tile(x, values, group, tile, channel, tiling):
    """Write values (TILE_PIXELS, TILE_CHANNELS) to a tile."""
    start, offsets, inside = _tile(group, tile, channel, tiling)
    tl.store(x + start + offsets, values, mask=inside)


@triton.jit
def load_channels(parameter, channel, tiling):
    """(1, TILE_CHANNELS) of a parameter (C,)."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    return tl.load(parameter + c, mask=c < tiling.CHANNELS, other=0).to(tl.float32)[None, :]


@triton.jit
def store_chunk(partial, sums, group, chunk, channel, tiling):
    """Write sums (TILE_CHANNELS,) to partial (groups, chunks, C)."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    row = (group * tiling.chunks + chunk) * tiling.CHANNELS
    tl.store(partial + row + c, sums, mask=c < tiling.CHANNELS)


@triton.jit
def load_reference(x, group, channel, tiling):
    """(TILE_CHANNELS,) first pixel of a group."""
    c = channel + tl.arange(0, tiling.TILE_CHANNELS)
    stride = 1 if tiling.CHANNELS_LAST else tiling.pixels
    offsets = group * tiling.images * tiling.CHANNELS * tiling.pixels + c * stride
    return tl.load(x + offsets, mask=c < tiling.CHANNELS, other=0).to(tl.float32)


@triton.jit
def load_chunks(partial, group, start, c, tiling, CHUNKS: tl.constexpr):
    """Rows start, start + 1, ... (CHUNKS, channels) of partial (groups, chunks, C), 0 outside."""
    chunk = (start + tl.arange(0, CHUNKS))[:, None]
    valid = (chunk < tiling.chunks) & (c < tiling.CHANNELS)[None, :]
    row = (group * tiling.chunks + chunk) * tiling.CHANNELS
    return tl.load(partial + row + c[None, :], mask=valid, other=0)


@triton.jit
def chunk_sizes(start, tiling, CHUNKS: tl.constexpr):
    """Pixels (CHUNKS, 1) of the chunks start, start + 1, ..., as float32, 0 outside."""
    first, end = tiles_of(start + tl.arange(0, CHUNKS), tiling)
    return (pixels_before(end, tiling) - pixels_before(first, tiling)).to(tl.float32)[:, None]


def tiling_of(x: Tensor, groups: int) -> Tiling:
    """The tiling of a dense tensor (B, C, H, W)."""
    batch, channels, height, width = x.shape
    images, pixels = batch // groups, height * width
    elements = TILE_BYTES // x.element_size()
    padded = triton.next_power_of_2(channels)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if channels_last:
        images, pixels = 1, images * pixels
        tile_channels = min(padded, ROW_BYTES // x.element_size())
        tile_pixels = elements // tile_channels
    else:
        tile_pixels = min(triton.next_power_of_2(pixels), elements)
        tile_channels = min(padded, elements // tile_pixels)
    tiles = images * triton.cdiv(pixels, tile_pixels)
    programs = groups * tiles * triton.cdiv(channels, tile_channels)
    per_chunk = min(2 ** (max(programs // PROGRAMS, 1).bit_length() - 1), MOST_TILES)
    constants = channels, channels_last, tile_pixels, tile_channels, per_chunk
    return Tiling(images, pixels, triton.cdiv(tiles, per_chunk), *map(tl.constexpr, constants))


def grid_of(groups: int, tiling: Tiling) -> tuple[int]:
    """One program for each group, chunk and block of channels."""
    blocks = triton.cdiv(tiling.CHANNELS.value, tiling.TILE_CHANNELS.value)
    return (groups * tiling.chunks * blocks,)


def partial_sums(x: Tensor, groups: int, tiling: Tiling) -> list[Tensor]:
    """Two tensors (groups, chunks, C) float32."""
    return [x.new_empty(groups, tiling.chunks, x.shape[1], dtype=torch.float32) for _ in range(2)]
