"""First pass of the multi-gate: all its operations that are linear in the experts' features; forward and backward.

With X_e the features of expert e, H the rows of all gated heads, stacked, and A_e, b_e the expert's own head:

    means[e, c]    = mean over the pixels of X_e[c]     (input of the gates)
    projections[e] = H X_e                              (mixed by the gates in mix_projections.py)
    own[e]         = A_e X_e + b_e                      (the expert's own prediction)

Backward, with dY_e the gradients of projections[e] and own[e], stacked like the rows R_e = [H; A_e]:

    dX_e = R_e^T dY_e + dmeans_e / pixels,    dR_e = sum over the pixels of dY_e X_e^T,    db_e = sum of dY_e's own rows

Bytes per pixel, with s bytes per element, E experts of C channels, O head rows and O_e own rows: forward reads E C s
and writes (E O + sum O_e) s; backward reads both and writes E C s. A program writes its sums over pixels as float32
partial sums, C values forward and rows times (C + 1) backward per 512 pixels of an expert; that is 1 to 3 % of the
traffic in bfloat16. They are added in a fixed order, so that every run gives the same bits.

A program takes one chunk of one image of one expert, tile by tile. A tile is (channels x pixels) of 8 KiB, four loads
of 16 bytes for each of 128 threads. Up to 128 channels it fits into the registers without spills in both passes, and
several programs on a multiprocessor hide each other's latency. Rows are padded to 16, the minimum of tensor cores. A
float32 product is three tf32 products, which together keep the precision of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import image_and_block

CHUNK = 512  # pixels of a program
TILE_BYTES = 8192
LEAST_DOT = 16  # minimum rows, columns and depth of a tensor-core product
MOST_CHANNELS = 128  # with more, the smallest tile does not fit into the registers


@triton.jit
def _project_expert(
    features,  # (C, P) of one image, strides (stride_c, stride_p)
    weights,  # (O + sum O_e, C)
    own_biases,  # (O_e,)
    sums,  # (C,) of this chunk
    projections,  # (O, P)
    own,  # (O_e, P)
    chunk,
    stride_c,
    stride_p,
    pixels,
    HEAD_ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    OWN_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,
):
    r, c, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    is_head, is_own = r < HEAD_ROWS, (r >= HEAD_ROWS) & (r < HEAD_ROWS + OWN_ROWS)
    row = tl.where(is_own, r + OWN_FIRST, r)
    rows = weights + row[:, None] * CHANNELS + c[None, :]
    weight = tl.load(rows, mask=(is_head | is_own)[:, None] & (c < CHANNELS)[None, :], other=0.0)
    bias = tl.load(own_biases + r - HEAD_ROWS, mask=is_own, other=0.0).to(tl.float32)
    tile = features + c[:, None].to(OFFSET) * stride_c + p[None, :].to(OFFSET) * stride_p
    to_rows = r[:, None].to(OFFSET) * pixels + p[None, :]
    heads = tl.cast(pixels, tl.int64) * HEAD_ROWS  # elements of the head rows, which precede the own rows
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK_P):
        start, inside = tl.cast(first, tl.int64), (first + p < pixels)[None, :]
        x = tl.load(tile + start * stride_p, mask=(c < CHANNELS)[:, None] & inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 1)
        y = tl.dot(weight, x, input_precision="tf32x3")
        tl.store(projections + start + to_rows, y, mask=is_head[:, None] & inside)
        tl.store(own - heads + start + to_rows, y + bias[:, None], mask=is_own[:, None] & inside)
    tl.store(sums + c, total, mask=c < CHANNELS)


@triton.jit
def project_experts_fwd_kernel(
    features,  # E x (B, C, P), strides (stride_b, stride_c, stride_p)
    weights,  # (O + sum O_e, C) in the dtype of the features: the gated heads, then each expert's own head
    own_biases,  # (sum O_e,)
    sums,  # (B, chunks, E, C) float32
    projections,  # (B, E, O, P)
    own,  # E x (B, O_e, P)
    stride_b,
    stride_c,
    stride_p,
    pixels,
    HEAD_ROWS: tl.constexpr,  # O
    OWN_ROWS: tl.constexpr,  # E x O_e
    OWN_FIRST: tl.constexpr,  # E x the first own row of an expert
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,  # integer type of offsets within an image
):
    image, chunk = image_and_block(pixels, CHUNK)
    experts: tl.constexpr = len(features)
    partial = tl.program_id(0).to(tl.int64) * experts
    for e in tl.static_range(experts):
        if tl.program_id(1) == e:
            _project_expert(
                features[e] + image * stride_b, weights, own_biases + OWN_FIRST[e], sums + (partial + e) * CHANNELS,
                projections + (image * experts + e) * HEAD_ROWS * pixels, own[e] + image * OWN_ROWS[e] * pixels,
                chunk, stride_c, stride_p, pixels, HEAD_ROWS, OWN_ROWS[e], OWN_FIRST[e], CHANNELS,
                CHUNK, BLOCK_R, BLOCK_C, BLOCK_P, OFFSET,
            )  # fmt: skip


@triton.jit
def _project_expert_backward(
    features,  # (C, P) of one image, strides (stride_c, stride_p)
    weights,  # (O + sum O_e, C)
    grad_means,  # (C,), or None
    grad_projections,  # (O, P), or None
    grad_own,  # (O_e, P), or None
    grad_features,  # (C, P), strides (grad_stride_c, grad_stride_p)
    grad_weights,  # (ROWS, C) of this chunk
    grad_biases,  # (ROWS,)
    chunk,
    stride_c,
    stride_p,
    grad_stride_c,
    grad_stride_p,
    pixels,
    HEAD_ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    OWN_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,
):
    r, c, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    is_head, is_own = r < HEAD_ROWS, (r >= HEAD_ROWS) & (r < HEAD_ROWS + OWN_ROWS)
    row = tl.where(is_own, r + OWN_FIRST, r)
    rows = weights + row[None, :] * CHANNELS + c[:, None]
    transposed = tl.load(rows, mask=(is_head | is_own)[None, :] & (c < CHANNELS)[:, None], other=0.0)
    mean_gradient = tl.zeros([BLOCK_C], tl.float32)
    if grad_means is not None:
        mean_gradient = tl.load(grad_means + c, mask=c < CHANNELS, other=0.0) / pixels
    tile = features + c[:, None].to(OFFSET) * stride_c + p[None, :].to(OFFSET) * stride_p
    grad_tile = grad_features + c[:, None].to(OFFSET) * grad_stride_c + p[None, :].to(OFFSET) * grad_stride_p
    to_rows = r[:, None].to(OFFSET) * pixels + p[None, :]
    heads = tl.cast(pixels, tl.int64) * HEAD_ROWS  # elements of the head rows, which precede the own rows
    dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_R], tl.float32)
    for first in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK_P):
        start, inside = tl.cast(first, tl.int64), (first + p < pixels)[None, :]
        valid = (c < CHANNELS)[:, None] & inside
        x = tl.load(tile + start * stride_p, mask=valid, other=0.0)
        dy = tl.zeros([BLOCK_R, BLOCK_P], x.dtype)
        if grad_projections is not None:
            dy += tl.load(grad_projections + start + to_rows, mask=is_head[:, None] & inside, other=0.0)
        if grad_own is not None:
            dy += tl.load(grad_own - heads + start + to_rows, mask=is_own[:, None] & inside, other=0.0)
        dx = tl.dot(transposed, dy, input_precision="tf32x3") + mean_gradient[:, None]
        tl.store(grad_tile + start * grad_stride_p, dx, mask=valid)
        dw = tl.dot(dy, tl.trans(x), dw, input_precision="tf32x3")
        db += tl.sum(dy.to(tl.float32), 1)
    tl.store(grad_weights + r[:, None] * CHANNELS + c[None, :], dw, mask=(r < ROWS)[:, None] & (c < CHANNELS)[None, :])
    tl.store(grad_biases + r, db, mask=r < ROWS)


@triton.jit
def project_experts_bwd_kernel(
    features,  # E x (B, C, P), strides (stride_b, stride_c, stride_p)
    weights,  # (O + sum O_e, C) in the dtype of the features
    grad_means,  # (B, E, C) float32, or None
    grad_projections,  # (B, E, O, P), or None
    grad_own,  # E x (B, O_e, P), or None
    grad_features,  # E x (B, C, P), strides (grad_stride_b, grad_stride_c, grad_stride_p)
    grad_weights,  # (B, chunks, E, ROWS, C) float32
    grad_biases,  # (B, chunks, E, ROWS) float32
    stride_b,
    stride_c,
    stride_p,
    grad_stride_b,
    grad_stride_c,
    grad_stride_p,
    pixels,
    ROWS: tl.constexpr,  # O + the largest O_e
    HEAD_ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    OWN_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,
):
    image, chunk = image_and_block(pixels, CHUNK)
    experts: tl.constexpr = len(features)
    partial = tl.program_id(0).to(tl.int64) * experts
    for e in tl.static_range(experts):
        if tl.program_id(1) == e:
            plane = image * experts + e
            _project_expert_backward(
                features[e] + image * stride_b, weights,
                None if grad_means is None else grad_means + plane * CHANNELS,
                None if grad_projections is None else grad_projections + plane * HEAD_ROWS * pixels,
                None if grad_own is None else grad_own[e] + image * OWN_ROWS[e] * pixels,
                grad_features[e] + image * grad_stride_b,
                grad_weights + (partial + e) * ROWS * CHANNELS, grad_biases + (partial + e) * ROWS,
                chunk, stride_c, stride_p, grad_stride_c, grad_stride_p, pixels,
                HEAD_ROWS, OWN_ROWS[e], OWN_FIRST[e], ROWS, CHANNELS, CHUNK, BLOCK_R, BLOCK_C, BLOCK_P, OFFSET,
            )  # fmt: skip


def forward(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Means (B, E, C) float32, projections (B, E, O, H, W), own predictions E x (B, O_e, H, W) in the features' dtype.

    features: E x (B, C, H, W) with equal strides, and one stride from pixel to pixel; weights: (O + sum O_e, C);
    own_biases: (sum O_e,); own_rows: the E numbers O_e.
    """
    x = features[0]
    batch, channels, height, width = x.shape
    chunks, constants = _launch(x, weights, own_rows)
    sums = torch.empty(batch, chunks, len(features), channels, dtype=torch.float32, device=x.device)
    projections = x.new_empty(batch, len(features), constants["HEAD_ROWS"], height, width)
    own = [x.new_empty(batch, rows, height, width) for rows in own_rows]
    if x.numel():
        with torch.cuda.device_of(x):
            weights = weights.to(x.dtype)
            project_experts_fwd_kernel[(batch * chunks, len(features))](
                tuple(features), weights, own_biases, sums, projections, tuple(own),
                *_plane_strides(x), height * width, **constants,
            )  # fmt: skip
    return sums.sum(1) / (height * width), projections, own


def backward(
    features: Sequence[Tensor],
    weights: Tensor,
    own_rows: Sequence[int],
    grad_means: Tensor | None,
    grad_projections: Tensor | None,
    grad_own: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the features in their dtype and layout, and of the weights and the own biases in float32.

    grad_means, grad_projections and grad_own: contiguous gradients of the results of `forward`, or None.
    """
    x = features[0]
    batch, channels, height, width = x.shape
    chunks, constants = _launch(x, weights, own_rows)
    head_rows, rows = constants["HEAD_ROWS"], constants["HEAD_ROWS"] + max(own_rows)
    grad_features = [torch.empty_like(x) for x in features]
    partial = torch.empty(batch, chunks, len(features), rows, channels, dtype=torch.float32, device=x.device)
    partial_biases = torch.empty(batch, chunks, len(features), rows, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            strides = *_plane_strides(x), *_plane_strides(grad_features[0])
            weights = weights.to(x.dtype)
            project_experts_bwd_kernel[(batch * chunks, len(features))](
                tuple(features), weights, grad_means, grad_projections, None if grad_own is None else tuple(grad_own),
                tuple(grad_features), partial, partial_biases, *strides, height * width, ROWS=rows, **constants,
            )  # fmt: skip
    grad_rows, grad_biases = partial.sum((0, 1)), partial_biases.sum((0, 1))
    own = [(e, slice(head_rows, head_rows + o)) for e, o in enumerate(own_rows)]
    grad_weights = torch.cat([grad_rows[:, :head_rows].sum(0), *(grad_rows[e, rows] for e, rows in own)])
    return grad_features, grad_weights, torch.cat([grad_biases[e, rows] for e, rows in own])


def _launch(x: Tensor, weights: Tensor, own_rows: Sequence[int]) -> tuple[int, dict[str, object]]:
    """Number of chunks of an image, and the constants of both kernels."""
    _, channels, height, width = x.shape
    head_rows, most_rows = weights.shape[0] - sum(own_rows), weights.shape[0] - sum(own_rows) + max(own_rows)
    block_c = max(triton.next_power_of_2(channels), LEAST_DOT)
    tile_pixels = TILE_BYTES // (block_c * x.element_size())
    farthest = max(_plane_strides(x)[1] * channels, max(most_rows, channels) * height * width)
    return triton.cdiv(height * width, CHUNK), {
        "HEAD_ROWS": head_rows,
        "OWN_ROWS": tuple(own_rows),
        "OWN_FIRST": tuple(sum(own_rows[:e]) for e in range(len(own_rows))),
        "CHANNELS": channels,
        "CHUNK": CHUNK,
        "BLOCK_R": max(triton.next_power_of_2(most_rows), LEAST_DOT),
        "BLOCK_C": block_c,
        "BLOCK_P": min(max(tile_pixels, LEAST_DOT), CHUNK),
        "OFFSET": tl.int32 if farthest < 2**31 else tl.int64,
        "num_warps": 4,
        "num_stages": 1,
    }


def _plane_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of image, channel and pixel. If a plane is one pixel wide, the next pixel is in the next row."""
    return x.stride(0), x.stride(1), x.stride(3 if x.shape[3] > 1 else 2)
