"""The public operations. They check their arguments and call the backend that `ops` chooses.

    from semimoe_fast import functional as F

All operations take CPU or CUDA tensors in any memory layout. All tensors of one call must be on one device.

Masks of `squared_distance` and `distance_targets` may also be NumPy arrays or objects with DLPack (CuPy, Numba, JAX).
Their dtype is bool or any integer, and every non-zero value is foreground, so touching instances form one region. With
instances=True the values are ids of instances: 0 is background, and every other value is an instance of its own, also
a negative one.

Targets of the losses hold class numbers from 0. Other numbers, such as 255, belong to no class. The losses accumulate
in float32 or float64 for every dtype of the logits.

Masks and class targets may be (B, 1, H, W) and may be floating-point if they hold only 0 and 1, as MONAI gives them.
The check of a floating-point tensor waits for the device on CUDA; integer tensors are never read for a check. Under
torch.compile(fullgraph=True) use bool or integers.

Errors: TypeError if an argument other than such a mask is not a dense tensor, or a differentiable one is not
floating-point; ValueError if devices or shapes disagree.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops import _arguments


def squared_distance(mask: Any, instances: bool = False) -> Tensor:
    """Exact squared Euclidean distance of every pixel to the nearest pixel of the opposite class, in pixels squared.

    mask: (B, 1, H, W), (B, H, W) or (H, W), bool, integer or floating-point with 0 and 1 only; sides and diagonal up
    to 46,340 pixels -> int32 of the same shape; -1 in images without background or without foreground.
    instances: the mask holds ids of instances, bool or integers. The distance of a foreground pixel is that to the
    nearest pixel of another instance or of the background; -1 if all pixels have one id. The time does not depend on
    the number of instances.
    Raises TypeError for floating-point masks with other values or with instances, ValueError for other shapes.
    """
    labels, restore = _arguments.label_batch(mask, instances)
    return restore(ops.implementation("squared_distance", labels.device)(labels, instances))


def distance_targets(mask: Any, ring_radius: float = 2, instances: bool = False) -> tuple[Tensor, Tensor]:
    """Training targets of the sdf expert and the boundary expert: signed distance field and boundary ring.

    mask, instances: as `squared_distance` takes them -> (sdf, boundary), shaped like mask.
    sdf: float32 in [-1, 1]. In the foreground it is the distance to the background (with instances, also to the nearest
    other instance), divided by its maximum over the image, but 0 where that distance is 1. In the background it is
    minus the distance to the foreground, divided by its maximum over the image. Images with only background are -1
    everywhere, images with only foreground (with instances, of one instance) +1.
    boundary: uint8, 1 on background pixels at most `ring_radius` pixels from the foreground. With instances also 1 on
    foreground pixels with another instance above, below, left or right, so that touching instances come apart.
    Raises errors as `squared_distance`, and ValueError for a negative radius.
    """
    if not isinstance(ring_radius, Real):
        raise TypeError(f"ring_radius is {ring_radius!r}: give a number of pixels")
    if not ring_radius >= 0:
        raise ValueError(f"ring_radius is {ring_radius}: give a radius of at least 0 pixels")
    labels, restore = _arguments.label_batch(mask, instances)
    compute = ops.implementation("distance_targets", labels.device)
    sdf, boundary = compute(labels, float(ring_radius), instances)
    return restore(sdf), restore(boundary)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Mix the experts' features with per-image, per-task weights and apply each task's 1x1 head.

    out_k = H_k (sum over e of gate_weights[:, k, e] X_e) + c_k.

    features X_e: E tensors (B, C, H, W); gate_weights: (B, T, E); head_weights H_k: T tensors (O_k, C) or
    (O_k, C, 1, 1); head_biases c_k: T tensors (O_k,) -> T tensors (B, O_k, H, W) in the dtype of the features.
    Differentiable in all arguments. The fused backend needs a GPU; the portable one serves CPU tensors.
    """
    matrices = _arguments.gate_matrices(features, gate_weights, head_weights, head_biases)
    return ops.implementation("multi_gate", features[0].device)(features, gate_weights, matrices, head_biases)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels from the gated mask, sdf and boundary outputs: argmax, tanh, argmax. No gradient flows.

    Arguments as `multi_gate` with T = 3 heads, for mask (K <= 256 rows), sdf (1 row) and boundary
    -> mask uint8 (B, H, W), sdf (B, 1, H, W) in the dtype of the features, boundary uint8 (B, H, W).
    """
    matrices = _arguments.gate_matrices(features, gate_weights, head_weights, head_biases)
    _arguments.check_tasks("pseudo_labels", matrices)
    return ops.implementation("pseudo_labels", features[0].device)(features, gate_weights, matrices, head_biases)


def project_experts(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor] = (),
    own_biases: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Apply all heads to the features X_e of each expert and average the features, in one pass over them.

    The gates compute their weights from the means, and `mix_projections` applies the weights to the projections.
    Training thus reads the features, by far the largest tensors, once in the forward pass and once in the backward
    pass.

    features: E tensors (B, C, H, W); head_weights H: T tensors (O_k, C) or (O_k, C, 1, 1); own_weights A_e and
    own_biases b_e, each expert's own head: E tensors (O_e, C) or (O_e, C, 1, 1) and E tensors (O_e,), or both empty
    -> means over the pixels (B, E, C) in float32 or float64; projections H X_e (B, E, sum O_k, H, W) and own
    predictions A_e X_e + b_e, E tensors (B, O_e, H, W), in the dtype of the features. Differentiable once in all
    arguments.
    """
    _arguments.check_floats(
        ("features", features),
        ("head_weights", head_weights),
        ("own_weights", own_weights),
        ("own_biases", own_biases),
    )
    _arguments.check_features(features)
    heads = _arguments.head_matrices("head_weights", head_weights, features)
    if len(own_weights) != len(own_biases):
        raise ValueError(f"own_biases match own_weights, got {len(own_biases)} and {len(own_weights)}")
    if len(own_weights) == 0:
        own_weights = [features[0].new_zeros(0, features[0].shape[1])] * len(features)
        own_biases = [weight[:, 0] for weight in own_weights]
    own = _arguments.head_matrices("own_weights", own_weights, features)
    _arguments.check_biases("own_biases", own_biases, own)
    if len(own) != len(features):
        raise ValueError(f"own_weights has a head for each of the {len(features)} experts or none, got {len(own)}")
    return ops.implementation("project_experts", features[0].device)(features, heads, own, own_biases)


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mix the projections of `project_experts` with per-image, per-task weights. Same result as `multi_gate`.

    projections: (B, E, sum O_k, H, W); gate_weights: (B, T, E); head_biases: T tensors (O_k,)
    -> T tensors (B, O_k, H, W) in the dtype of the projections. Differentiable once in all arguments.
    """
    _arguments.check_projections(projections, gate_weights, head_biases)
    return ops.implementation("mix_projections", projections.device)(projections, gate_weights, head_biases)


def label_projections(
    projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels from the projections of `project_experts`. Same result as `pseudo_labels`. No gradient flows.

    Arguments as `mix_projections` with T = 3 heads, for mask (K <= 256 rows), sdf (1 row) and boundary
    -> mask uint8 (B, H, W), sdf (B, 1, H, W) in the dtype of the projections, boundary uint8 (B, H, W).
    """
    _arguments.check_projections(projections, gate_weights, head_biases)
    _arguments.check_tasks("label_projections", head_biases)
    return ops.implementation("label_projections", projections.device)(projections, gate_weights, head_biases)


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + 1) / (sum (P^2 + T^2) + 1), P = softmax(logits), T one-hot.

    logits: (B, K, H, W), K at least 2; target: class numbers (B, H, W) or (B, 1, H, W), integers or floating-point
    with 0 and 1 only; numbers outside 0 .. K-1 belong to no class -> scalar.
    Raises ValueError for K = 1, where P is always 1, and if shapes disagree, TypeError for other float targets.
    """
    _arguments.check_tensors(logits=logits, target=target)
    target = _arguments.class_target("squared_dice_loss", logits, target)
    return ops.implementation("squared_dice_loss", logits.device)(logits, target)


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + e) / (sum P + sum T + e), e = 1e-8.

    Shapes and errors as `squared_dice_loss`.
    """
    _arguments.check_tensors(logits=logits, target=target)
    target = _arguments.class_target("soft_dice_loss", logits, target)
    return ops.implementation("soft_dice_loss", logits.device)(logits, target)


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """Mean of (tanh(raw) - sdf)^2 over all elements.

    raw: (B, 1, H, W); sdf: (B, 1, H, W) or (B, H, W) -> scalar.
    """
    _arguments.check_tensors(raw=raw, sdf=sdf)
    _arguments.check_sdf(raw, sdf)
    return ops.implementation("tanh_mse_loss", raw.device)(raw, sdf)


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """squared_dice_loss, tanh_mse_loss and soft_dice_loss of one set of predictions, in this order.

    mask_logits: (B, K, H, W); raw_sdf: (B, 1, H, W); boundary_logits: (B, L, H, W), K and L at least 2;
    mask, boundary: class numbers as `squared_dice_loss` takes them (convert a 0/255 mask by `mask != 0` first);
    sdf: (B, 1, H, W) or (B, H, W) -> (3,). Differentiable once in the predictions. Errors as `squared_dice_loss`.
    """
    predictions = (mask_logits, raw_sdf, boundary_logits)
    targets = _arguments.objective_targets("objective_terms", *predictions, mask, sdf, boundary)
    return ops.implementation("objective_terms", mask_logits.device)(*predictions, *targets)


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """Sum of `objective_terms` over S sets of predictions for the same targets, which are read once.

    predictions: S tuples (mask_logits (B, K, H, W), raw_sdf (B, 1, H, W), boundary_logits (B, L, H, W)), whose dtypes
    may differ; targets as `objective_terms` takes them -> (3,). Differentiable once in the predictions.
    Raises ValueError if shapes or numbers of classes disagree, and errors as `squared_dice_loss`.
    """
    sets = predictions if isinstance(predictions, Sequence) else ()
    if not sets or not all(isinstance(prediction, Sequence) and len(prediction) == 3 for prediction in sets):
        raise ValueError(
            "predictions are S tuples (mask_logits, raw_sdf, boundary_logits), got "
            f"{type(predictions).__name__} of lengths {[len(x) if isinstance(x, Sequence) else None for x in sets]}"
        )
    for prediction in predictions:
        mask, sdf, boundary = _arguments.objective_targets("joint_objective_terms", *prediction, mask, sdf, boundary)
        if any(x.shape != first.shape for x, first in zip(prediction, predictions[0], strict=True)):
            raise ValueError(
                "joint_objective_terms: all sets of predictions have the classes of the first, got shapes "
                f"{[tuple(x.shape) for x in prediction]} after {[tuple(x.shape) for x in predictions[0]]}"
            )
    compute = ops.implementation("joint_objective_terms", mask.device)
    return compute(predictions, mask, sdf, boundary)


def adaptive_loss(
    terms: Tensor, log_vars: Tensor, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4
) -> Tensor:
    """Adaptive multi-objective loss: sum over j of c_j exp(-s_j) L_j + regularizer exp(s_j).

    terms, log_vars (s): (T,); coefficients (c): T numbers -> scalar.
    """
    _arguments.check_floats(terms=terms, log_vars=log_vars)
    if terms.ndim != 1 or terms.shape != log_vars.shape or len(coefficients) != terms.shape[0]:
        raise ValueError(
            f"adaptive_loss needs as many terms as log_vars and coefficients, got {tuple(terms.shape)}, "
            f"{tuple(log_vars.shape)} and {len(coefficients)}"
        )
    return ops.implementation("adaptive_loss", terms.device)(terms, log_vars, coefficients, regularizer)


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
    """relu(weight (x - mean) / sqrt(variance + eps) + bias), per channel: nn.BatchNorm2d and ReLU in one.

    Training: the B images are `groups` equal runs of consecutive images. Mean and biased variance are those of a run,
    and each run updates the running statistics in turn with its unbiased variance. So the result is that of `groups`
    calls of nn.BatchNorm2d, one per run. Evaluation (training=False): mean and variance are the running ones, which
    stay as they are, and `groups` has no effect.

    x: (B, C, H, W), float32, bfloat16 or float16, with statistics in float32, or float64; weight, bias: (C,);
    running_mean, running_var: (C,), updated in place; None if none are wanted -> y as x, channels-last if x is.
    momentum: weight of the newest run in the running statistics.
    skip: (B, S, H, W) -> the result is the concatenation (B, S + C, H, W) of skip and y. In training on the CPU, y is
    written into it, if both are channels-last and S and C are multiples of 16.
    Differentiable in x, weight, bias and skip; the fused backend once. Raises ValueError for other shapes, if `groups`
    does not divide B, in training if a run has at most one value per channel, and in evaluation without running
    statistics.
    """
    arguments = x, weight, bias, running_mean, running_var, momentum, eps, groups, training, skip
    _arguments.check_batch_norm(*arguments)
    return ops.implementation("batch_norm_relu", x.device)(*arguments)


def fold_upsampling(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Weights of convolutions after nearest x2 upsampling -> kernels of equal transposed convolutions.

    conv2d(interpolate(x, scale_factor=2), weight, padding=1) is conv_transpose2d(x, kernel, stride=2, padding=1), which
    computes 4 products per output pixel instead of 9: of three neighbors in an upsampled image two are copies of one
    pixel, so their weights are summed. Per axis, the taps (before, here, after) give (after, here + after,
    before + here, before).

    weights: tensors (O, C, 3, 3) of one dtype, with O and C of each its own -> kernels (C, O, 4, 4) in `dtype`
    (default: that of the weights), summed in float32 or float64, and in the memory layout that the convolution takes:
    channels-last on CUDA; on the CPU the order y, x, C, O. Differentiable, and linear. All weights are folded in one
    operation, on CUDA in one launch. Raises ValueError for other shapes, TypeError for other and for mixed dtypes.
    """
    _arguments.check_fold_upsampling(weights, dtype)
    return ops.implementation("fold_upsampling", weights[0].device)(weights, dtype) if weights else []
