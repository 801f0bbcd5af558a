"""Functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_and_block(pixels, BLOCK: tl.constexpr):
    """Image (64 bits) and block of pixels (32 bits) of the program, which the grid's first axis, the longest, counts.

    Divides in 32 bits, because GPUs divide 64 bits in many instructions.
    """
    blocks = tl.cdiv(tl.cast(pixels, tl.int64), BLOCK).to(tl.int32)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def tanh(x):
    """(tanh(x), its derivative), without cancellation at large |x|."""
    e = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - e) / (1 + e)
    return tl.where(x < 0, -magnitude, magnitude), 4 * e / ((1 + e) * (1 + e))
