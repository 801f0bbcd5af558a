"""Second pass of the multi-gate: the gates mix the projections of the experts; forward, pseudo-labels and backward.

With Z_e the projections of expert e (see project_experts.py), w the gate weights and k the task of head row o:

    out[o]  = sum over e of w[k, e] Z_e[o] + c[o]
    dZ_e[o] = w[k, e] dout[o],    dw[k, e] = sum over pixels and the rows o of k of dout[o] Z_e[o],    dc = sum of dout

The pseudo-labels are the argmax, tanh and argmax of out; their kernel stores only the labels.

Bytes per pixel, with s bytes per element, E experts and O head rows: forward reads E O s and writes O s (labels: s +
2). Backward reads (E + 1) O s and writes E O s, and E + 1 float32 partial sums per row and block of pixels, which are
added in a fixed order. At the published sizes that is a tenth of the traffic of project_experts.py, so simple tiling
suffices: a program takes a block of pixels, 16 bytes per thread of every row, and keeps the weights of its image in
registers.

Accumulation is in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import image_and_block, tanh

WARPS = 4
VECTOR_BYTES = 16  # bytes of a thread's widest load


@triton.jit
def _mixed_row(
    projections,  # (E, O, P) of one image
    weights,  # (E,) of one image and task
    biases,  # (O,)
    row,
    p,
    pixels,
    EXPERTS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
):
    mixed = tl.load(biases + row).to(tl.float32)
    for e in tl.static_range(EXPERTS):
        z = tl.load(projections + (e * HEAD_ROWS + row) * pixels + p, mask=p < pixels, other=0.0)
        mixed += tl.load(weights + e).to(tl.float32) * z.to(tl.float32)
    return mixed


@triton.jit
def mix_projections_fwd_kernel(
    projections,  # (B, E, O, P)
    gate_weights,  # (B, T, E)
    biases,  # (O,)
    outputs,  # T x (B, O_k, P)
    pixels,
    ROWS: tl.constexpr,  # T x O_k
    FIRST: tl.constexpr,  # T x the first row of a task
    HEAD_ROWS: tl.constexpr,  # O
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = tl.cast(pixels, tl.int64)  # offsets of planes may exceed 32 bits
    image, block = image_and_block(pixels, BLOCK)
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tasks: tl.constexpr = len(outputs)
    z = projections + image * EXPERTS * HEAD_ROWS * pixels
    for k in tl.static_range(tasks):
        weights = gate_weights + (image * tasks + k) * EXPERTS
        for o in tl.static_range(tl.constexpr(ROWS[k])):
            mixed = _mixed_row(z, weights, biases, FIRST[k] + o, p, pixels, EXPERTS, HEAD_ROWS)
            tl.store(outputs[k] + (image * ROWS[k] + o) * pixels + p, mixed, mask=p < pixels)


@triton.jit
def _largest_row(
    z, weights, biases, first, p, pixels, CLASSES: tl.constexpr, EXPERTS: tl.constexpr, HEAD_ROWS: tl.constexpr
):
    """The class of the largest output: the first one of equals, and NaN counts as the largest, as in torch.argmax."""
    best = _mixed_row(z, weights, biases, first, p, pixels, EXPERTS, HEAD_ROWS)
    label = tl.zeros(best.shape, tl.uint8)
    for k in tl.static_range(1, CLASSES):
        value = _mixed_row(z, weights, biases, first + k, p, pixels, EXPERTS, HEAD_ROWS)
        wins = (best == best) & ((value > best) | (value != value))
        best = tl.where(wins, value, best)
        label = tl.where(wins, k, label)
    return label


@triton.jit
def label_projections_fwd_kernel(
    projections,  # (B, E, O, P), O = K + 1 + L
    gate_weights,  # (B, 3, E)
    biases,  # (O,)
    mask,  # (B, P) uint8
    sdf,  # (B, P)
    boundary,  # (B, P) uint8
    pixels,
    CLASSES: tl.constexpr,  # K
    HEAD_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = tl.cast(pixels, tl.int64)  # offsets of planes may exceed 32 bits
    image, block = image_and_block(pixels, BLOCK)
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = projections + image * EXPERTS * HEAD_ROWS * pixels
    weights = gate_weights + image * 3 * EXPERTS
    out = image * pixels + p
    label = _largest_row(z, weights, biases, 0, p, pixels, CLASSES, EXPERTS, HEAD_ROWS)
    tl.store(mask + out, label, mask=p < pixels)
    raw = _mixed_row(z, weights + EXPERTS, biases, CLASSES, p, pixels, EXPERTS, HEAD_ROWS)
    sdf_label, _ = tanh(raw)
    tl.store(sdf + out, sdf_label, mask=p < pixels)
    weights += 2 * EXPERTS
    label = _largest_row(z, weights, biases, CLASSES + 1, p, pixels, HEAD_ROWS - CLASSES - 1, EXPERTS, HEAD_ROWS)
    tl.store(boundary + out, label, mask=p < pixels)


@triton.jit
def mix_projections_bwd_kernel(
    projections,  # (B, E, O, P)
    gate_weights,  # (B, T, E)
    grad_outputs,  # T x (B, O_k, P)
    grad_projections,  # (B, E, O, P)
    grad_rows,  # (B, blocks, O, E + 1) float32: sums of grad Z_e for each e, and of grad
    pixels,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of 2 above E
    BLOCK: tl.constexpr,
):
    pixels = tl.cast(pixels, tl.int64)
    image, block = image_and_block(pixels, BLOCK)
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    e = tl.arange(0, PADDED)
    tasks: tl.constexpr = len(grad_outputs)
    for k in tl.static_range(tasks):
        weights = tl.load(gate_weights + (image * tasks + k) * EXPERTS + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
        for o in tl.static_range(tl.constexpr(ROWS[k])):
            row = FIRST[k] + o
            grad = tl.load(grad_outputs[k] + (image * ROWS[k] + o) * pixels + p, mask=inside, other=0.0).to(tl.float32)
            plane = ((image * EXPERTS + e) * HEAD_ROWS + row)[:, None] * pixels + p[None, :]
            valid = (e < EXPERTS)[:, None] & inside[None, :]
            z = tl.load(projections + plane, mask=valid, other=1.0).to(tl.float32)  # the ones of row E sum grad itself
            tl.store(grad_projections + plane, weights[:, None] * grad[None, :], mask=valid)
            sums = grad_rows + (tl.program_id(0).to(tl.int64) * HEAD_ROWS + row) * (EXPERTS + 1) + e
            tl.store(sums, tl.sum(grad[None, :] * z, 1), mask=e <= EXPERTS)


def forward(projections: Tensor, gate_weights: Tensor, biases: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Mix projections (B, E, O, H, W) by gate_weights (B, T, E), add biases (O,); rows: T numbers O_k.

    Returns T x (B, O_k, H, W) in the dtype of the projections.
    """
    batch, experts, head_rows, height, width = projections.shape
    outputs = [projections.new_empty(batch, o, height, width) for o in rows]
    with torch.cuda.device_of(projections):
        if projections.numel():
            block = _block(projections)
            mix_projections_fwd_kernel[(batch * _blocks(projections, block),)](
                projections, gate_weights, biases, tuple(outputs), height * width,
                tuple(rows), _first(rows), head_rows, experts, block, num_warps=WARPS,
            )  # fmt: skip
    return outputs


def labels(projections: Tensor, gate_weights: Tensor, biases: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels from projections (B, E, K + 1 + L, H, W), gate_weights (B, 3, E), biases (K + 1 + L,); classes: K.

    Returns mask uint8 (B, H, W), sdf (B, 1, H, W) in the dtype of the projections, boundary uint8 (B, H, W).
    """
    batch, experts, head_rows, height, width = projections.shape
    mask, boundary = (projections.new_empty(batch, height, width, dtype=torch.uint8) for _ in range(2))
    sdf = projections.new_empty(batch, 1, height, width)
    with torch.cuda.device_of(projections):
        if projections.numel():
            block = _block(projections)
            label_projections_fwd_kernel[(batch * _blocks(projections, block),)](
                projections, gate_weights, biases, mask, sdf, boundary, height * width,
                classes, head_rows, experts, block, num_warps=WARPS,
            )  # fmt: skip
    return mask, sdf, boundary


def backward(
    projections: Tensor, gate_weights: Tensor, grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the arguments of `forward`, given contiguous grad_outputs T x (B, O_k, H, W).

    Returns those of the projections in their dtype, of the gate weights (B, T, E) and the biases (O,) in float32.
    """
    batch, experts, head_rows, height, width = projections.shape
    rows = [grad.shape[1] for grad in grad_outputs]
    grad_projections = torch.empty_like(projections)
    block = _block(projections)
    blocks = _blocks(projections, block)
    partial = torch.empty(batch, blocks, head_rows, experts + 1, dtype=torch.float32, device=projections.device)
    with torch.cuda.device_of(projections):
        if projections.numel():
            mix_projections_bwd_kernel[(batch * blocks,)](
                projections, gate_weights, tuple(grad_outputs), grad_projections, partial,
                height * width, tuple(rows), _first(rows), head_rows, experts,
                triton.next_power_of_2(experts + 1), block, num_warps=WARPS,
            )  # fmt: skip
    grad_rows = partial.sum(1)
    grad_weights = torch.stack([task.sum(1) for task in grad_rows[..., :experts].split(rows, 1)], 1)
    return grad_projections, grad_weights, grad_rows[..., experts].sum(0)


def _first(rows: Sequence[int]) -> tuple[int, ...]:
    """The first row of each task."""
    return tuple(sum(rows[:k]) for k in range(len(rows)))


def _block(projections: Tensor) -> int:
    """Pixels of a program."""
    return WARPS * 32 * VECTOR_BYTES // projections.element_size()


def _blocks(projections: Tensor, block: int) -> int:
    """Programs of an image."""
    return triton.cdiv(projections.shape[3] * projections.shape[4], block)
