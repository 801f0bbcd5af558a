"""The operations in fast plain PyTorch on any device, with the results of `reference`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_norm_portable import batch_norm_relu
from .fold_upsampling import fold
from .gate import apply
from .gate_portable import label_projections, labels, mix_projections
from .reference import at_least_float32, one_hot, targets_from_distance, touching

__all__ = [
    "adaptive_loss",
    "batch_norm_relu",
    "distance_targets",
    "fold_upsampling",
    "joint_objective_terms",
    "label_projections",
    "mix_projections",
    "multi_gate",
    "objective_terms",
    "project_experts",
    "pseudo_labels",
    "soft_dice_loss",
    "squared_dice_loss",
    "squared_distance",
    "tanh_mse_loss",
]

FAR = 2**16  # distance in a column or row of one label; exceeds every diagonal whose square fits into int32
ROW_CHUNK = 2**24  # pairs of pixels of a row that the row search holds in memory at once


def squared_distance(labels: Tensor, instances: bool = False) -> Tensor:
    """See `reference.squared_distance`. One pass serves all labels; no synchronization with the device.

    With g(x') the distance within column x' to another label and r(x) that within the row,
    d^2(x) = min(r(x)^2, min over x' in the row of (x - x')^2 + g(x')^2).
    Where x' has another label than x, g(x') says nothing about x, but then (x - x')^2 >= r(x)^2.
    """
    labels = labels if instances else labels != 0
    batch, height, width = labels.shape
    if labels.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.int32)
    columns = _distance_in_columns(labels).square().reshape(-1, width)
    rows = _distance_in_columns(labels.transpose(1, 2)).transpose(1, 2).square().reshape(-1, width)
    x = torch.arange(width, device=labels.device)
    parabolas = [(part[:, None] - x).square() for part in x.split(max(1, ROW_CHUNK // width))]
    chunks = columns.split(max(1, ROW_CHUNK // (width * width)))
    across = [torch.cat([(chunk[:, None] + parabola).amin(-1) for parabola in parabolas], 1) for chunk in chunks]
    best = torch.minimum(torch.cat(across), rows)
    return torch.where(best < FAR * FAR, best, -1).to(torch.int32).reshape(batch, height, width)


def _distance_in_columns(labels: Tensor) -> Tensor:
    """Distance within the column to the nearest pixel of another label, FAR if the column has one label; int64.

    For a run of equal pixels from row s to row n - 1, the nearest pixels of another label are in rows s - 1 and n.
    """
    height = labels.shape[1]
    y = torch.arange(height, device=labels.device)[:, None]
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    above = torch.where(starts, y - 1, -FAR).cummax(1).values
    following = torch.full_like(above, height + FAR)
    following[:, :-1] = torch.where(starts[:, 1:], y[1:], height + FAR)
    below = following.flip(1).cummin(1).values.flip(1)
    return torch.minimum(y - above, below - y).clamp(max=FAR)


def distance_targets(labels: Tensor, ring_radius: float = 2, instances: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.distance_targets`."""
    sdf, ring = targets_from_distance(labels != 0, squared_distance(labels, instances), ring_radius)
    return sdf, ring | touching(labels) if instances else ring


def project_experts(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `reference.project_experts`."""
    return apply(features, head_weights, own_weights, own_biases, fused=False)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """See `reference.multi_gate`. Gate weights and heads are multiplied to one (O, C) matrix per image and expert:

    out = sum over e of (w[k(o), e] H[o]) X_e + c, where o counts the rows of all heads and k(o) is the task of row o.
    So the mixed features need no memory, and each expert's features are read once, in any memory layout.
    """
    batch, _, height, width = features[0].shape
    dtype = features[0].dtype
    folded = torch.cat([gate_weights[:, k, :, None, None] * weight for k, weight in enumerate(head_weights)], 2)
    out = torch.cat(list(head_biases)).to(dtype)[:, None].expand(batch, -1, height * width)
    with torch.autocast(out.device.type, enabled=False):  # keep the dtype of the features
        for matrix, feature in zip(folded.to(dtype).unbind(1), features, strict=True):
            out = torch.baddbmm(out, matrix, feature.flatten(2))
    return out.unflatten(2, (height, width)).split([weight.shape[0] for weight in head_weights], 1)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pseudo_labels`."""
    with torch.no_grad():
        return labels(*multi_gate(features, gate_weights, head_weights, head_biases))


def fold_upsampling(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """See `reference.fold_upsampling`."""
    return fold(weights, dtype, fused=False)


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.squared_dice_loss`; computed in float32 or float64."""
    p, t = _softmax_and_one_hot(logits, target)
    return _dice_loss((p * t).sum((2, 3)), (p * p + t).sum((2, 3)), 1)


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.soft_dice_loss`; computed in float32 or float64."""
    p, t = _softmax_and_one_hot(logits, target)
    return _dice_loss((p * t).sum((2, 3)), (p + t).sum((2, 3)), 1e-8)


def _softmax_and_one_hot(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    p = at_least_float32(logits).softmax(1)
    return p, one_hot(target, logits.shape[1], p.dtype)


def _dice_loss(overlap: Tensor, mass: Tensor, smooth: float) -> Tensor:
    return (1 - (2 * overlap + smooth) / (mass + smooth)).mean()


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """See `reference.tanh_mse_loss`; computed in float32 or float64."""
    tanh = at_least_float32(raw).tanh()
    return (tanh - sdf.reshape(raw.shape)).square().mean().to(tanh.dtype)


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `reference.objective_terms`; float64 if any logits are."""
    terms = squared_dice_loss(mask_logits, mask), tanh_mse_loss(raw_sdf, sdf), soft_dice_loss(boundary_logits, boundary)
    dtype = functools.reduce(torch.promote_types, (term.dtype for term in terms))
    return torch.stack([term.to(dtype) for term in terms])


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `reference.joint_objective_terms`."""
    return sum(objective_terms(*prediction, mask, sdf, boundary) for prediction in predictions)


def adaptive_loss(
    terms: Tensor, log_vars: Tensor, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4
) -> Tensor:
    """See `reference.adaptive_loss`."""
    weighted = torch.stack([c * term for c, term in zip(coefficients, terms.unbind(), strict=True)])
    return (weighted * torch.exp(-log_vars)).sum() + regularizer * torch.exp(log_vars).sum()
