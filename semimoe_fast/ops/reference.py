"""The operations exactly as their formulas say: slow, obvious, and the reference of every test.

This file optimizes nothing and imports nothing of the package. Other files use its `targets_from_distance`, `touching`,
`one_hot`, `squared_radius` and `at_least_float32`; the golden archives check the first three. Floating-point functions
compute in the dtype of their inputs, losses and batch normalization at least in float32; so float64 inputs give a
float64 reference, and autograd differentiates them.

Symbols (arXiv 2509.13834): B images, E experts, T tasks, C feature channels, K classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
UNREACHABLE = 2**40  # exceeds every squared distance in an image; sums of it do not overflow int64


def squared_distance(labels: Tensor, instances: bool = False) -> Tensor:
    """Squared Euclidean distance of every pixel to the nearest pixel of another label.

    labels (B, H, W), 0 is background; with instances every other value is a label of its own, else all are one
    -> int32 (B, H, W); -1 if the image has no other label.
    d(y, x) = min over (y', x') of another label of (y - y')^2 + (x - x')^2, one axis after the other.
    """
    labels = labels if instances else labels != 0
    distance = torch.full(labels.shape, UNREACHABLE, device=labels.device)
    for label in labels.to(torch.int64).unique() if instances else (False, True):
        distance = torch.where(labels == label, _distance_to(labels != label), distance)
    return torch.where(distance < UNREACHABLE, distance, -1).to(torch.int32)


def _distance_to(sites: Tensor) -> Tensor:
    """Squared distance of every pixel to the nearest site, int64; at least UNREACHABLE if there is no site."""
    cost = torch.where(sites, 0, UNREACHABLE)
    return _min_plus_parabola(_min_plus_parabola(cost, dim=1), dim=2)


def _min_plus_parabola(cost: Tensor, dim: int) -> Tensor:
    """out[i] = min over j of cost[j] + (i - j)^2 along one axis."""
    cost = cost.movedim(dim, -1)
    best = cost.clone()
    for k in range(1, cost.shape[-1]):
        best[..., k:] = torch.minimum(best[..., k:], cost[..., :-k] + k * k)
        best[..., :-k] = torch.minimum(best[..., :-k], cost[..., k:] + k * k)
    return best.movedim(-1, dim)


def distance_targets(labels: Tensor, ring_radius: float = 2, instances: bool = False) -> tuple[Tensor, Tensor]:
    """Normalized signed distance field and boundary of a mask or an instance map.

    labels (B, H, W) -> sdf float32 (B, H, W) in [-1, 1], boundary uint8 (B, H, W) in {0, 1}.
    """
    sdf, ring = targets_from_distance(labels != 0, squared_distance(labels, instances), ring_radius)
    return sdf, ring | touching(labels) if instances else ring


def targets_from_distance(foreground: Tensor, squared: Tensor, ring_radius: float) -> tuple[Tensor, Tensor]:
    """Signed distance field and ring from squared distances (int32, -1 in constant images)."""
    inside = torch.where(foreground, squared, 0)
    outside = torch.where(foreground, 0, squared)
    sdf = _over_image_maximum(inside) - _over_image_maximum(outside)
    sdf = torch.where(inside == 1, 0.0, sdf)
    constant = torch.where(foreground, 1.0, -1.0).to(sdf.dtype)
    boundary = (outside > 0) & (outside <= squared_radius(ring_radius))
    return torch.where(squared < 0, constant, sdf).float(), boundary.to(torch.uint8)


def squared_radius(radius: float) -> int:
    """The largest int32 whose root is at most the radius: 13 for math.sqrt(13), although its square is below 13."""
    n = math.floor(min(radius * radius, INT32_MAX - 1))
    if math.sqrt(n + 1) <= radius:
        return n + 1
    return n if math.sqrt(n) <= radius else n - 1


def touching(labels: Tensor) -> Tensor:
    """Foreground pixels with another instance above, below, left or right: uint8 (B, H, W) in {0, 1}."""
    result = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):
        rows, marked = labels.transpose(1, dim), result.transpose(1, dim)
        touch = (rows[:, 1:] != rows[:, :-1]) & (rows[:, 1:] != 0) & (rows[:, :-1] != 0)
        marked[:, 1:] |= touch
        marked[:, :-1] |= touch
    return result.to(torch.uint8)


def _over_image_maximum(squared: Tensor) -> Tensor:
    """Distances divided by their maximum over the image. The clamp avoids 0 / 0 if all distances are 0."""
    distance = squared.clamp(min=0).double().sqrt()
    if distance.numel() == 0:  # amax refuses empty images
        return distance
    return distance / distance.amax((1, 2), keepdim=True).clamp(min=1)


def project_experts(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Means of X_e over the pixels, projections H X_e (H stacks the rows of all heads), own predictions A_e X_e + b_e.

    E x (B, C, H, W), T x (O_k, C), E x (O_e, C), E x (O_e,) -> (B, E, C), (B, E, sum O_k, H, W), E x (B, O_e, H, W).
    """
    heads = torch.cat(list(head_weights))
    means = torch.stack([x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) for x in features], 1)
    projections = torch.stack([torch.einsum("oc,bchw->bohw", heads.to(x.dtype), x) for x in features], 1)
    own = tuple(
        torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x) + bias.to(x.dtype)[:, None, None]
        for weight, bias, x in zip(own_weights, own_biases, features, strict=True)
    )
    return means, projections, own


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out_k = sum over e of w[k, e] Z_ke + c_k, where Z_ke are the projections of expert e by the head of task k.

    (B, E, sum O_k, H, W), (B, T, E), T x (O_k,) -> T x (B, O_k, H, W).
    """
    outputs = []
    per_task = projections.split([len(bias) for bias in head_biases], 2)
    for z, weights, bias in zip(per_task, gate_weights.unbind(1), head_biases, strict=True):
        mixed = torch.einsum("be,beohw->bohw", weights.to(z.dtype), z)
        outputs.append(mixed + bias.to(z.dtype)[:, None, None])
    return tuple(outputs)


def label_projections(
    projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """argmax, tanh and argmax of the mixed mask, sdf and boundary outputs, without gradient; T = 3."""
    with torch.no_grad():
        mask, sdf, boundary = mix_projections(projections, gate_weights, head_biases)
        return mask.argmax(1).to(torch.uint8), sdf.tanh(), boundary.argmax(1).to(torch.uint8)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """fused_k = sum over e of w[k, e] X_e; out_k = H_k fused_k + c_k.

    E x (B, C, H, W), (B, T, E), T x (O_k, C), T x (O_k,) -> T x (B, O_k, H, W).
    """
    outputs, dtype = [], features[0].dtype
    gate_weights = gate_weights.to(dtype)
    for task, (weight, bias) in enumerate(zip(head_weights, head_biases, strict=True)):
        fused = sum(gate_weights[:, task, e, None, None, None] * x for e, x in enumerate(features))
        outputs.append(torch.einsum("oc,bchw->bohw", weight.to(dtype), fused) + bias.to(dtype)[:, None, None])
    return tuple(outputs)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """argmax, tanh and argmax of the gated mask, sdf and boundary outputs, without gradient.

    Arguments as multi_gate with T = 3 -> mask uint8 (B, H, W), sdf (B, 1, H, W), boundary uint8 (B, H, W).
    """
    with torch.no_grad():
        mask, sdf, boundary = multi_gate(features, gate_weights, head_weights, head_biases)
        return mask.argmax(1).to(torch.uint8), sdf.tanh(), boundary.argmax(1).to(torch.uint8)


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + 1) / (sum (P^2 + T^2) + 1). (B, K, H, W), (B, H, W) -> ()."""
    p = at_least_float32(logits).softmax(1)
    t = one_hot(target, p.shape[1], p.dtype)
    return (1 - (2 * (p * t).sum((2, 3)) + 1) / ((p**2 + t**2).sum((2, 3)) + 1)).mean()


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + e) / (sum P + sum T + e), e = 1e-8."""
    p = at_least_float32(logits).softmax(1)
    t = one_hot(target, p.shape[1], p.dtype)
    return (1 - (2 * (p * t).sum((2, 3)) + 1e-8) / (p.sum((2, 3)) + t.sum((2, 3)) + 1e-8)).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, because float16 overflows in sums over the pixels of an image."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_hot(target: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """T[b, k] = 1 where the target is class k: (B, H, W) -> (B, classes, H, W)."""
    return torch.stack([target == k for k in range(classes)], 1).to(dtype)


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """Mean of (tanh(raw) - sdf)^2 over all elements. (B, 1, H, W), (B, 1, H, W) or (B, H, W) -> ()."""
    return ((at_least_float32(raw).tanh() - sdf.reshape(raw.shape)) ** 2).mean()


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """The three objectives in the order mask, sdf, boundary -> (3,)."""
    return torch.stack(
        [
            squared_dice_loss(mask_logits, mask),
            tanh_mse_loss(raw_sdf, sdf),
            soft_dice_loss(boundary_logits, boundary),
        ]
    )


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """The sum of objective_terms over sets of predictions: S x ((B, K, H, W), (B, 1, H, W), (B, 2, H, W)) -> (3,)."""
    return sum(objective_terms(*prediction, mask, sdf, boundary) for prediction in predictions)


def adaptive_loss(
    terms: Tensor, log_vars: Tensor, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4
) -> Tensor:
    """sum over j of c_j exp(-s_j) L_j + regularizer exp(s_j). (T,), (T,) -> ()."""
    return sum(
        c * torch.exp(-s) * term + regularizer * torch.exp(s)
        for c, s, term in zip(coefficients, log_vars, terms, strict=True)
    )


def fold_upsampling(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Per axis, the taps (before, here, after) give (after, here + after, before + here, before).

    Weights (O, C, 3, 3) -> kernels (C, O, 4, 4); in float32 for bfloat16 and float16, then cast.
    """

    def folded(taps: Tensor, dim: int) -> Tensor:
        before, here, after = taps.unbind(dim)
        return torch.stack((after, here + after, before + here, before), dim)

    kernels = []
    for weight in weights:
        precise = at_least_float32(weight)
        kernels.append(folded(folded(precise, 2), 3).transpose(0, 1).to(dtype or weight.dtype))
    return kernels


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    training: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """relu(weight (x - mean) / sqrt(variance + eps) + bias); in float32 for bfloat16 and float16.

    Training: the statistics are those of each of `groups` runs of images, and update the running ones run after run,
    which get the unbiased variance. Evaluation: the statistics are the running ones.
    """

    def after_skip(y: Tensor) -> Tensor:
        return y if skip is None else torch.cat([skip, y], 1)

    def normalized(run: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        mean, deviation, scale, shift = (v[:, None, None] for v in (mean, (variance + eps).sqrt(), weight, bias))
        return ((run - mean) / deviation * scale + shift).relu().to(x.dtype)

    precise = at_least_float32(x)
    if not training:
        return after_skip(normalized(precise, running_mean, running_var))
    outputs = []
    for run in precise.chunk(groups):
        mean, variance = run.mean((0, 2, 3)), run.var((0, 2, 3), correction=0)
        outputs.append(normalized(run, mean, variance))
        if running_mean is not None:
            with torch.no_grad():
                n = run[:, 0].numel()
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
                running_var.copy_((1 - momentum) * running_var + momentum * variance * n / (n - 1))
    return after_skip(torch.cat(outputs))
