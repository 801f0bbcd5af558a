"""Fold the weights of upsampling convolutions into those of transposed convolutions, in one launch; and the adjoint.

Along an axis, a pixel before upsampling reaches 4 outputs by the taps (before, here, after). For each axis in turn,

    kernel = (after, here + after, before + here, before)
    dbefore = g2 + g3,    dhere = g1 + g2,    dafter = g0 + g1        where g is the gradient of the kernel

Both directions read 9 or 16 numbers of a pair (input channel, output channel) and write 16 or 9, each once: 68 bytes
per pair for float32 weights and bfloat16 kernels. Pairs are independent, so there are neither atomics nor sums over
programs.

One launch serves all weights, because the small ones alone would not fill a GPU: programs follow each other weight by
weight, and a program selects its weight and kernel by comparing its number with the first program of every weight. All
shapes are constants, so 16-byte accesses need no check; a model compiles each direction once. A program takes a tile of
32 x 32 pairs: channels are contiguous in channels-last weights and output channels in kernels, so a tile is transposed
in shared memory; loads and stores are runs of 128 bytes (float32) or 64 bytes (16-bit numbers).

Arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
WARPS = 4


@triton.jit
def _place(
    weights,  # L x (O_l, C_l, 3, 3)
    kernels,  # L x (C_l, O_l, 4, 4), channels-last
    OUTPUTS: tl.constexpr,  # L x O_l
    CHANNELS: tl.constexpr,  # L x C_l
    FIRST: tl.constexpr,  # L first programs
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pointers (TILE, TILE) to the first tap of the program's pairs in weight and kernel, which pairs exist, and the
    distances from tap to tap."""
    program = tl.program_id(0)
    weight, kernel, outputs, channels, first = weights[0], kernels[0], OUTPUTS[0], CHANNELS[0], FIRST[0]
    for i in tl.static_range(1, len(FIRST)):
        mine = program >= FIRST[i]
        weight = tl.where(mine, weights[i], weight)
        kernel = tl.where(mine, kernels[i], kernel)
        outputs = tl.where(mine, OUTPUTS[i], outputs)
        channels = tl.where(mine, CHANNELS[i], channels)
        first = tl.where(mine, FIRST[i], first)
    blocks = tl.cdiv(outputs, TILE)
    first_o = ((program - first) % blocks * TILE).to(tl.int64)
    first_c = ((program - first) // blocks * TILE).to(tl.int64)
    o, c = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (o < outputs - first_o) & (c < channels - first_c)
    channel_stride: tl.constexpr = 1 if CHANNELS_LAST else 9
    weight += first_o * 9 * channels + first_c * channel_stride
    kernel += first_c * 16 * outputs + first_o
    weight += o * 9 * channels + c * channel_stride
    kernel += c * 16 * outputs + o
    return weight, kernel, inside, channels if CHANNELS_LAST else 1, outputs


@triton.jit
def _load(pointers, tap, stride, inside):
    return tl.load(pointers + tap * stride, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(pointers, tap, stride, value, inside):
    tl.store(pointers + tap * stride, value.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _folded_row(weight, row, stride, inside):
    """The four sums of a row of three taps."""
    before = _load(weight, 3 * row, stride, inside)
    here = _load(weight, 3 * row + 1, stride, inside)
    after = _load(weight, 3 * row + 2, stride, inside)
    return after, here + after, before + here, before


@triton.jit
def fold_upsampling_fwd_kernel(
    weights,  # L x (O_l, C_l, 3, 3)
    kernels,  # L x (C_l, O_l, 4, 4) out, channels-last
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the weights
    TILE: tl.constexpr,
):
    weight, kernel, inside, in_stride, out_stride = _place(
        weights, kernels, OUTPUTS, CHANNELS, FIRST, CHANNELS_LAST, TILE
    )  # fmt: skip
    before = _folded_row(weight, 0, in_stride, inside)
    here = _folded_row(weight, 1, in_stride, inside)
    after = _folded_row(weight, 2, in_stride, inside)
    for x in tl.static_range(4):
        _store(kernel, x, out_stride, after[x], inside)
        _store(kernel, 4 + x, out_stride, here[x] + after[x], inside)
        _store(kernel, 8 + x, out_stride, before[x] + here[x], inside)
        _store(kernel, 12 + x, out_stride, before[x], inside)


@triton.jit
def _adjoint_row(grad_kernel, row, stride, inside):
    """Gradients of three taps from those of the four sums of a row."""
    g0 = _load(grad_kernel, 4 * row, stride, inside)
    g1 = _load(grad_kernel, 4 * row + 1, stride, inside)
    g2 = _load(grad_kernel, 4 * row + 2, stride, inside)
    g3 = _load(grad_kernel, 4 * row + 3, stride, inside)
    return g2 + g3, g1 + g2, g0 + g1


@triton.jit
def fold_upsampling_bwd_kernel(
    grad_weights,  # L x (O_l, C_l, 3, 3) out
    grad_kernels,  # L x (C_l, O_l, 4, 4), channels-last
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the gradients of the weights
    TILE: tl.constexpr,
):
    weight, kernel, inside, out_stride, in_stride = _place(
        grad_weights, grad_kernels, OUTPUTS, CHANNELS, FIRST, CHANNELS_LAST, TILE
    )  # fmt: skip
    row0 = _adjoint_row(kernel, 0, in_stride, inside)
    row1 = _adjoint_row(kernel, 1, in_stride, inside)
    row2 = _adjoint_row(kernel, 2, in_stride, inside)
    row3 = _adjoint_row(kernel, 3, in_stride, inside)
    for x in tl.static_range(3):
        _store(weight, x, out_stride, row2[x] + row3[x], inside)
        _store(weight, 3 + x, out_stride, row1[x] + row2[x], inside)
        _store(weight, 6 + x, out_stride, row0[x] + row1[x], inside)


def forward(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights (O, C, 3, 3) of one dtype, all contiguous or all channels-last -> kernels (C, O, 4, 4), channels-last.

    dtype: that of the kernels.
    """
    kernels = [_empty_transposed(w, 4, dtype, torch.channels_last) for w in weights]
    _launch(fold_upsampling_fwd_kernel, weights, kernels)
    return kernels


def backward(grad_kernels: Sequence[Tensor], dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """Gradients (C, O, 4, 4) of the kernels, channels-last -> gradients (O, C, 3, 3) of the weights.

    dtype, layout: those of the weights.
    """
    grad_weights = [_empty_transposed(grad, 3, dtype, layout) for grad in grad_kernels]
    _launch(fold_upsampling_bwd_kernel, grad_weights, grad_kernels)
    return grad_weights


def _empty_transposed(x: Tensor, taps: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """(A, B, ...) -> (B, A, taps, taps)."""
    return torch.empty(x.shape[1], x.shape[0], taps, taps, dtype=dtype, device=x.device, memory_format=layout)


def _launch(kernel: triton.JITFunction, weights: Sequence[Tensor], kernels: Sequence[Tensor]) -> None:
    outputs, channels = zip(*(weight.shape[:2] for weight in weights), strict=True)
    programs = [triton.cdiv(o, TILE) * triton.cdiv(c, TILE) for o, c in zip(outputs, channels, strict=True)]
    first = tuple(accumulate(programs, initial=0))
    channels_last = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with torch.cuda.device_of(weights[0]):
        kernel[(first[-1],)](
            tuple(weights), tuple(kernels), outputs, channels, first[:-1], channels_last, TILE, num_warps=WARPS
        )
