"""The multi-gate in fast plain PyTorch, forward and backward.

On a CPU the features do not fit into the caches, so memory traffic dominates. All heads that apply to an expert are
stacked into one matrix: one matrix product per expert in the forward pass, two in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def forward(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `functional.project_experts`; here the head matrices are stacked.

    features: E x (B, C, H, W); weights: the O rows of all heads, then those of the own heads (O + sum O_e, C);
    own_biases: (sum O_e,); own_rows: E row counts O_e -> means (B, E, C) in float32 or float64, projections
    (B, E, O, H, W), own predictions E x (B, O_e, H, W).
    """
    x = features[0]
    head_rows = weights.shape[0] - sum(own_rows)
    means = torch.stack([x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) for x in features], 1)
    projections = x.new_empty(x.shape[0], len(features), head_rows, *x.shape[2:])
    own = []
    each = zip(features, _stacks(weights, own_rows), own_biases.to(x.dtype).split(list(own_rows)), strict=True)
    for e, (feature, rows, bias) in enumerate(each):
        y = (rows.to(x.dtype) @ feature.flatten(2)).unflatten(2, x.shape[2:])
        projections[:, e] = y[:, :head_rows]
        own.append(y[:, head_rows:] + bias[:, None, None])
    return means, projections, own


def backward(
    features: Sequence[Tensor],
    weights: Tensor,
    own_rows: Sequence[int],
    grad_means: Tensor | None,
    grad_projections: Tensor | None,
    grad_own: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the features, with their dtype and strides, and of weights and own biases, in float32 or float64.

    Arguments as `forward`, and the gradients of its results, each None if the result is unused.
    """
    x = features[0]
    batch, channels, height, width = x.shape
    head_rows = weights.shape[0] - sum(own_rows)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    grad_features, grad_own_rows, grad_biases = [], [], []
    grad_heads = torch.zeros_like(weights[:head_rows], dtype=dtype)
    for e, (feature, rows) in enumerate(zip(features, _stacks(weights, own_rows), strict=True)):
        # A last row of ones takes the gradient of the means along in the product, which saves a pass over the features.
        dy = x.new_zeros(batch, len(rows) + 1, height * width)
        dy[:, -1] = 1
        if grad_projections is not None:
            dy[:, :head_rows] = grad_projections[:, e].flatten(2)
        if grad_own is not None:
            dy[:, head_rows:-1] = grad_own[e].flatten(2)
        stack = x.new_zeros(batch, len(rows) + 1, channels)
        stack[:, :-1] = rows
        if grad_means is not None:
            stack[:, -1] = grad_means[:, e] / (height * width)
        grad_features.append(_pixelwise(stack, dy, feature))
        dy = dy[:, :-1]
        grad_rows = (dy @ feature.flatten(2).mT).sum(0, dtype=dtype)
        grad_heads += grad_rows[:head_rows]
        grad_own_rows.append(grad_rows[head_rows:])
        grad_biases.append(dy[:, head_rows:].sum((0, 2), dtype=dtype))
    return grad_features, torch.cat([grad_heads, *grad_own_rows]), torch.cat(grad_biases)


def _stacks(weights: Tensor, own_rows: Sequence[int]) -> Iterator[Tensor]:
    """For each expert, the rows of all heads followed by the rows of its own head."""
    heads, *own = weights.split([weights.shape[0] - sum(own_rows), *own_rows])
    return (torch.cat([heads, rows]) for rows in own)


def _pixelwise(rows: Tensor, dy: Tensor, like: Tensor) -> Tensor:
    """rows^T dy for every pixel: (B, C, H, W) in the memory layout of `like`."""
    result = torch.empty_like(like)
    if result.is_contiguous():
        torch.bmm(rows.mT, dy, out=result.flatten(2))
    elif result.is_contiguous(memory_format=torch.channels_last):
        torch.bmm(dy.mT, rows, out=result.permute(0, 2, 3, 1).flatten(1, 2))
    else:
        result.copy_((rows.mT @ dy).view_as(like))
    return result


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `reference.mix_projections`. One matrix product per task."""
    batch, _, _, height, width = projections.shape
    rows = [len(bias) for bias in head_biases]
    per_task = projections.flatten(2).split([o * height * width for o in rows], 2)
    outputs = []
    with torch.autocast(projections.device.type, enabled=False):  # keep the dtype of the projections
        for task_projections, weights, bias in zip(per_task, gate_weights.unbind(1), head_biases, strict=True):
            mixed = weights.to(projections.dtype)[:, None] @ task_projections
            outputs.append(mixed.view(batch, len(bias), height, width) + bias.to(projections.dtype)[:, None, None])
    return tuple(outputs)


def label_projections(
    projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.label_projections`."""
    with torch.no_grad():
        return labels(*mix_projections(projections, gate_weights, head_biases))


def labels(mask: Tensor, sdf: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """argmax, tanh and argmax of the gated outputs."""
    return _largest(mask), sdf.tanh(), _largest(boundary)


def _largest(logits: Tensor) -> Tensor:
    """torch.argmax over the classes as uint8. Vectorized over pixels, because torch.argmax is scalar on the CPU."""
    best = logits[:, 0]
    label = torch.zeros_like(best, dtype=torch.uint8)
    for k, value in enumerate(logits.unbind(1)[1:], 1):
        wins = (value > best) | (value.isnan() & ~best.isnan())
        label = torch.where(wins, torch.full_like(label, k), label)
        best = torch.where(wins, value, best)
    return label
