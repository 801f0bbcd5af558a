"""The multi-gate in fast plain PyTorch, forward and backward: the formulas of `reference`, features read once each way.

On a CPU the features do not fit into any cache, so what counts is how often they are read and written: with all rows
that are applied to an expert stacked, one matrix product does it forward, two backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def forward(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Means (B, E, C), projections (B, E, O, H, W) and own predictions E x (B, O_e, H, W) of E features (B, C, H, W).

    weights: (O + sum O_e, C), own_biases: (sum O_e,), own_rows: E numbers O_e. Means in at least float32.
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
    """Gradients of the features, as these are, of the weights and of the own biases, these in at least float32.

    Arguments as of `forward`, and the gradients of its results, None where there is none.
    """
    x = features[0]
    batch, channels, height, width = x.shape
    head_rows = weights.shape[0] - sum(own_rows)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    grad_features, of_heads, of_own, of_biases = [], torch.zeros_like(weights[:head_rows], dtype=dtype), [], []
    for e, (feature, rows) in enumerate(zip(features, _stacks(weights, own_rows), strict=True)):
        dy = x.new_zeros(batch, len(rows), height * width)
        if grad_projections is not None:
            dy[:, :head_rows] = grad_projections[:, e].flatten(2)
        if grad_own is not None:
            dy[:, head_rows:] = grad_own[e].flatten(2)
        of_mean = x.new_zeros(batch, channels, 1)
        if grad_means is not None:
            of_mean = (grad_means[:, e, :, None] / (height * width)).to(x.dtype)
        grad_features.append(_pixelwise(rows.to(x.dtype), dy, of_mean, feature))
        of_rows = (dy @ feature.flatten(2).mT).sum(0, dtype=dtype)
        of_heads += of_rows[:head_rows]
        of_own.append(of_rows[head_rows:])
        of_biases.append(dy[:, head_rows:].sum((0, 2), dtype=dtype))
    return grad_features, torch.cat([of_heads, *of_own]), torch.cat(of_biases)


def _stacks(weights: Tensor, own_rows: Sequence[int]) -> Iterator[Tensor]:
    """For each expert the rows of all heads and of its own."""
    heads, *own = weights.split([weights.shape[0] - sum(own_rows), *own_rows])
    return (torch.cat([heads, rows]) for rows in own)


def _pixelwise(rows: Tensor, dy: Tensor, of_mean: Tensor, like: Tensor) -> Tensor:
    """rows^T dy + of_mean for every pixel, (B, C, H, W) in the memory layout of `like`."""
    result = torch.empty_like(like)
    if result.is_contiguous():
        torch.baddbmm(of_mean, rows.mT.expand(len(dy), -1, -1), dy, out=result.view(like.shape[0], like.shape[1], -1))
    elif result.is_contiguous(memory_format=torch.channels_last):
        pixels = result.permute(0, 2, 3, 1).view(like.shape[0], -1, like.shape[1])
        torch.baddbmm(of_mean.mT, dy.mT, rows.expand(len(dy), -1, -1), out=pixels)
    else:
        result.copy_((rows.mT @ dy + of_mean).view_as(like))
    return result


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `reference.mix_projections`. One product of the gate weights with all rows of a task."""
    batch, _, _, height, width = projections.shape
    rows = [len(bias) for bias in head_biases]
    of_tasks = projections.flatten(2).split([o * height * width for o in rows], 2)
    outputs = []
    with torch.autocast(projections.device.type, enabled=False):  # the dtype is that of the projections
        for of_task, weights, bias in zip(of_tasks, gate_weights.unbind(1), head_biases, strict=True):
            mixed = weights.to(projections.dtype)[:, None] @ of_task
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
    """torch.argmax over the classes, uint8: on a CPU, where that walks from pixel to pixel, in vectors instead."""
    best = logits[:, 0]
    label = torch.zeros_like(best, dtype=torch.uint8)
    for k, value in enumerate(logits.unbind(1)[1:], 1):
        wins = (value > best) | (value.isnan() & ~best.isnan())
        label = torch.where(wins, torch.full_like(label, k), label)
        best = torch.where(wins, value, best)
    return label
