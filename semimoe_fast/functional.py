"""The public operations: shapes, dtypes and errors are settled here, the arithmetic in the backend that `ops` chooses.

    from semimoe_fast import functional as F

Everything takes CPU or CUDA tensors in any memory layout. The masks of the two distance operations may also be anything
that speaks DLPack (NumPy, CuPy, Numba, JAX), of bool or any integer dtype, where every non-zero value is foreground
(instances that touch are one region); results are torch tensors on the device of the input. The targets of the losses
are class numbers from 0; other numbers, such as 255, are of no class. Losses accumulate in at least float32 whatever
the dtype of the logits.

Apart from those masks, arrays are torch tensors, and those of one call are on one device: TypeError for anything else,
ValueError for several devices.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops

INT32_MAX = 2**31 - 1
MAX_SIDE = 46_340  # the largest integer whose square int32 holds


def squared_distance(mask: Any) -> Tensor:
    """Exact squared Euclidean distance of every pixel to the nearest pixel of the opposite class, in pixels squared.

    mask: (B, H, W) or (H, W), bool or integer, sides and diagonal up to 46,340 -> int32 of the same shape; -1 where an
    image is constant.
    Raises TypeError for floating-point masks, ValueError for other shapes.
    """
    masks, restore = _mask_batch(mask)
    return restore(ops.implementation("squared_distance", masks.device)(masks))


def distance_targets(mask: Any, ring_radius: float = 2) -> tuple[Tensor, Tensor]:
    """Training targets of the sdf and the boundary expert.

    mask: (B, H, W) or (H, W), bool or integer -> (sdf, boundary), shaped like mask.
    sdf: float32 in [-1, 1]: distance inside over the image's largest, minus distance outside over its largest, and 0 on
    foreground pixels that touch the background by an edge. Constant masks give -1 (background) or +1 everywhere.
    boundary: uint8, 1 on background pixels at most `ring_radius` pixels from the foreground.
    Raises TypeError for floating-point masks, ValueError for other shapes or a negative radius.
    """
    if not isinstance(ring_radius, Real):
        raise TypeError(f"ring_radius is {ring_radius!r}: give a number of pixels")
    if not ring_radius >= 0:
        raise ValueError(f"ring_radius is {ring_radius}: give a radius of at least 0 pixels")
    masks, restore = _mask_batch(mask)
    sdf, boundary = ops.implementation("distance_targets", masks.device)(masks, float(ring_radius))
    return restore(sdf), restore(boundary)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Mix the experts' features with per-image, per-task weights and apply each task's 1x1 head.

    out_k = H_k (sum over e of gate_weights[:, k, e] X_e) + c_k.

    features: E tensors (B, C, H, W); gate_weights: (B, T, E); head_weights: T tensors (O_k, C) or (O_k, C, 1, 1);
    head_biases: T tensors (O_k,) -> T tensors (B, O_k, H, W) in the dtype of the features. Differentiable in all.
    """
    matrices = _check_gate(features, gate_weights, head_weights, head_biases)
    return ops.implementation("multi_gate", features[0].device)(features, gate_weights, matrices, head_biases)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels from the gated mask, sdf and boundary outputs: argmax, tanh, argmax. No gradient flows.

    Arguments as `multi_gate` with T = 3 -> mask uint8 (B, H, W), sdf (B, 1, H, W) in the dtype of the features,
    boundary uint8 (B, H, W).
    """
    matrices = _check_gate(features, gate_weights, head_weights, head_biases)
    _check_tasks("pseudo_labels", matrices)
    return ops.implementation("pseudo_labels", features[0].device)(features, gate_weights, matrices, head_biases)


def project_experts(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor] = (),
    own_biases: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """All of the multi-gate that is linear in the experts' features X_e, in one pass over them.

    For training: the means go to the gates, whose weights `mix_projections` then applies to the projections, so that
    the features, far larger than all else here, are read once forward, and read and written once backward.

    features: E tensors (B, C, H, W); head_weights: T tensors (O_k, C) or (O_k, C, 1, 1); own_weights, own_biases: each
    expert's own head, E tensors (O_e, C) or (O_e, C, 1, 1) and E tensors (O_e,), or none at all
    -> means over the pixels (B, E, C), at least float32; projections H X_e (B, E, sum O_k, H, W), and own predictions
    A_e X_e + b_e, E tensors (B, O_e, H, W), in the dtype of the features. Differentiable once in all.
    """
    _check_tensors(
        ("features", features),
        ("head_weights", head_weights),
        ("own_weights", own_weights),
        ("own_biases", own_biases),
    )
    _check_features(features)
    heads = _check_heads("head_weights", head_weights, features)
    if len(own_weights) != len(own_biases):
        raise ValueError(f"own_biases match own_weights, got {len(own_biases)} and {len(own_weights)}")
    if len(own_weights) == 0:
        own_weights = [features[0].new_zeros(0, features[0].shape[1])] * len(features)
        own_biases = [weight[:, 0] for weight in own_weights]
    own = _check_heads("own_weights", own_weights, features)
    _check_biases("own_biases", own_biases, own)
    if len(own) != len(features):
        raise ValueError(f"own_weights has a head for each of the {len(features)} experts or none, got {len(own)}")
    return ops.implementation("project_experts", features[0].device)(features, heads, own, own_biases)


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mix the projections of `project_experts` with per-image, per-task weights: what `multi_gate` gives.

    projections: (B, E, sum O_k, H, W); gate_weights: (B, T, E); head_biases: T tensors (O_k,)
    -> T tensors (B, O_k, H, W) in the dtype of the projections. Differentiable once in all.
    """
    _check_projections(projections, gate_weights, head_biases)
    return ops.implementation("mix_projections", projections.device)(projections, gate_weights, head_biases)


def label_projections(
    projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels straight from the projections of `project_experts`: what `pseudo_labels` gives. No gradient flows.

    Arguments as `mix_projections` with T = 3, for mask (K), sdf (1) and boundary
    -> mask uint8 (B, H, W), sdf (B, 1, H, W) in the dtype of the projections, boundary uint8 (B, H, W).
    """
    _check_projections(projections, gate_weights, head_biases)
    _check_tasks("label_projections", head_biases)
    return ops.implementation("label_projections", projections.device)(projections, gate_weights, head_biases)


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + 1) / (sum (P^2 + T^2) + 1), P = softmax(logits), T one-hot.

    logits: (B, K, H, W), K at least 2; target: (B, H, W) integer classes, a value outside 0 .. K-1 belongs to none
    -> scalar. Raises ValueError for K = 1, where P is 1 whatever the logits, and for shapes that disagree.
    """
    _check_tensors(logits=logits, target=target)
    _check_classes("squared_dice_loss", logits, target)
    return ops.implementation("squared_dice_loss", logits.device)(logits, target)


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images and classes of 1 - (2 sum P T + e) / (sum P + sum T + e), e = 1e-8.

    Shapes and errors as `squared_dice_loss`.
    """
    _check_tensors(logits=logits, target=target)
    _check_classes("soft_dice_loss", logits, target)
    return ops.implementation("soft_dice_loss", logits.device)(logits, target)


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """Mean of (tanh(raw) - sdf)^2 over all elements, compared element by element.

    raw: (B, 1, H, W); sdf: (B, 1, H, W) or (B, H, W) -> scalar.
    """
    _check_tensors(raw=raw, sdf=sdf)
    _check_sdf(raw, sdf)
    return ops.implementation("tanh_mse_loss", raw.device)(raw, sdf)


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """squared_dice_loss, tanh_mse_loss and soft_dice_loss of one set of predictions, in this order.

    (B, K, H, W), (B, 1, H, W), (B, L, H, W) against (B, H, W), (B, 1, H, W) or (B, H, W), (B, H, W) -> (3,). mask and
    boundary hold class numbers below K and L, each at least 2 (2 in training); a 0/255 mask is `mask != 0` first.
    Differentiable once in the predictions. Errors as `squared_dice_loss`.
    """
    _check_objective("objective_terms", mask_logits, raw_sdf, boundary_logits, mask, sdf, boundary)
    compute = ops.implementation("objective_terms", mask_logits.device)
    return compute(mask_logits, raw_sdf, boundary_logits, mask, sdf, boundary)


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """The sum of `objective_terms` over S sets of predictions against the same targets, which are read once.

    predictions: S x (mask_logits (B, K, H, W), raw_sdf (B, 1, H, W), boundary_logits (B, L, H, W)), each tensor in a
    dtype of its own; targets as `objective_terms` takes them -> (3,). Differentiable once in the predictions.
    Raises ValueError where shapes or the numbers of classes disagree, TypeError for floating-point classes.
    """
    sets = predictions if isinstance(predictions, Sequence) else ()
    if not sets or not all(isinstance(prediction, Sequence) and len(prediction) == 3 for prediction in sets):
        raise ValueError(
            "predictions are S tuples (mask_logits, raw_sdf, boundary_logits), got "
            f"{type(predictions).__name__} of lengths {[len(x) if isinstance(x, Sequence) else None for x in sets]}"
        )
    for prediction in predictions:
        _check_objective("joint_objective_terms", *prediction, mask, sdf, boundary)
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
    _check_tensors(terms=terms, log_vars=log_vars)
    if terms.ndim != 1 or terms.shape != log_vars.shape or len(coefficients) != terms.shape[0]:
        raise ValueError(
            f"adaptive_loss needs as many terms as log_vars and coefficients, got {tuple(terms.shape)}, "
            f"{tuple(log_vars.shape)} and {len(coefficients)}"
        )
    return ops.implementation("adaptive_loss", terms.device)(terms, log_vars, coefficients, regularizer)


def _mask_batch(mask: Any) -> tuple[Tensor, Any]:
    """The mask as contiguous (B, H, W), uint8 or bool on the CPU, and the function that restores the caller's shape."""
    tensor = _mask_tensor(mask)
    if tensor.ndim not in (2, 3):
        raise ValueError(f"a mask is (B, H, W) or (H, W), got shape {tuple(tensor.shape)}")
    height, width = tensor.shape[-2:]
    if max(height, width) > MAX_SIDE or (height - 1) ** 2 + (width - 1) ** 2 > INT32_MAX:
        raise ValueError(
            f"a mask of {height} x {width} pixels is too large: int32 holds squared distances up to a side or "
            f"diagonal of {MAX_SIDE:,} pixels; cut it into tiles"
        )
    if tensor.ndim == 3:
        return tensor.contiguous(), lambda result: result
    return tensor[None].contiguous(), lambda result: result[0]


def _mask_tensor(mask: Any) -> Tensor:
    if isinstance(mask, Tensor):
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"a mask of dtype {mask.dtype} is ambiguous: threshold it first, for example mask > 0.5")
        # kernels on a GPU read every integer type
        return mask if mask.is_cuda or mask.dtype in (torch.uint8, torch.bool) else mask != 0
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biu":
            raise TypeError(f"a mask of dtype {mask.dtype} is ambiguous: threshold it first, for example mask > 0.5")
        return torch.from_numpy(mask != 0)  # a fresh array: read-only memory and negative strides need no special case
    if hasattr(mask, "__dlpack__"):
        return _mask_tensor(torch.from_dlpack(mask))
    if hasattr(mask, "__cuda_array_interface__"):  # Numba's device arrays do not speak DLPack
        return _mask_tensor(torch.as_tensor(mask, device="cuda"))
    raise TypeError(f"a mask is a tensor or an array, got {type(mask).__name__}: use np.asarray(mask)")


def _check_tensors(*sequences: tuple[str, Any], **tensors: Any) -> None:
    """Raise TypeError for arguments, and items of sequences, that are no tensors; ValueError where devices differ."""
    every = [(name, x) for name, items in sequences for x in (items if isinstance(items, Iterable) else [items])]
    every += tensors.items()
    for name, x in every:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(x).__name__}; use torch.as_tensor")
        first, expected = every[0][0], every[0][1].device
        if x.device != expected:
            raise ValueError(f"{name} is on {x.device}, {first} on {expected}: move them to one device with .to()")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: floating-point numbers are needed, got dtype {x.dtype}; use .float()")


def _check_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> list[Tensor]:
    """Raise ValueError where shapes disagree; the head weights as (O_k, C) matrices."""
    _check_tensors(
        ("features", features),
        ("head_weights", head_weights),
        ("head_biases", head_biases),
        gate_weights=gate_weights,
    )
    _check_features(features)
    _check_weights(gate_weights, (features[0].shape[0], len(head_weights), len(features)))
    matrices = _check_heads("head_weights", head_weights, features)
    _check_biases("head_biases", head_biases, matrices)
    return matrices


def _check_features(features: Sequence[Tensor]) -> None:
    if isinstance(features, Tensor):
        raise TypeError(f"features is a sequence of E tensors (B, C, H, W), got one tensor {tuple(features.shape)}")
    if not features or features[0].ndim != 4 or any(x.shape != features[0].shape for x in features):
        raise ValueError(f"features are E tensors of one shape (B, C, H, W), got {[tuple(x.shape) for x in features]}")
    if any(x.dtype != features[0].dtype for x in features):
        raise TypeError(f"features are E tensors of one dtype, got {[x.dtype for x in features]}")
    _check_floating("features", features[0])


def _check_weights(gate_weights: Tensor, expected: tuple[int, int, int]) -> None:
    if gate_weights.shape != expected:
        raise ValueError(f"gate_weights is (B, T, E) = {expected} here, got {tuple(gate_weights.shape)}")


def _check_heads(name: str, weights: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    channels = features[0].shape[1]
    matrices = [weight.flatten(1) for weight in weights]
    if any(matrix.shape[1] != channels for matrix in matrices):
        raise ValueError(f"{name} are (O, {channels}) for these features, got {[tuple(w.shape) for w in weights]}")
    return matrices


def _check_biases(name: str, biases: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    if [tuple(bias.shape) for bias in biases] != [(len(matrix),) for matrix in matrices]:
        rows = [len(matrix) for matrix in matrices]
        raise ValueError(f"{name} match the rows {rows} of the weights, got {[tuple(bias.shape) for bias in biases]}")


def _check_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> None:
    _check_tensors(("head_biases", head_biases), projections=projections, gate_weights=gate_weights)
    _check_floating("projections", projections)
    rows = [len(bias) for bias in head_biases]
    if projections.ndim != 5 or projections.shape[2] != sum(rows):
        raise ValueError(f"projections are (B, E, {sum(rows)}, H, W) for these biases, got {tuple(projections.shape)}")
    _check_weights(gate_weights, (projections.shape[0], len(rows), projections.shape[1]))


def _check_tasks(name: str, heads: Sequence[Tensor]) -> None:
    rows = [len(head) for head in heads]
    if len(rows) != 3 or rows[1] != 1:
        raise ValueError(f"{name} takes the heads of mask (K), sdf (1) and boundary (2 rows), got rows {rows}")


def _check_objective(
    name: str,
    mask_logits: Tensor,
    raw_sdf: Tensor,
    boundary_logits: Tensor,
    mask: Tensor,
    sdf: Tensor,
    boundary: Tensor,
) -> None:
    _check_tensors(
        mask_logits=mask_logits,
        raw_sdf=raw_sdf,
        boundary_logits=boundary_logits,
        mask=mask,
        sdf=sdf,
        boundary=boundary,
    )
    _check_classes(f"{name}: mask", mask_logits, mask)
    _check_sdf(raw_sdf, sdf)
    _check_classes(f"{name}: boundary", boundary_logits, boundary)
    if not mask.shape == boundary.shape == (raw_sdf.shape[0], *raw_sdf.shape[2:]):
        raise ValueError(
            f"{name}: mask, sdf and boundary are of the same images, got {tuple(mask.shape)}, {tuple(sdf.shape)} and "
            f"{tuple(boundary.shape)}"
        )


def _check_classes(name: str, logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 4 or target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{name}: logits (B, K, H, W) and target (B, H, W) disagree: {tuple(logits.shape)}, {tuple(target.shape)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"{name}: logits of {logits.shape[1]} channel(s) have no gradient, softmax needs at least 2: give "
            "background and foreground; of one channel x, torch.cat([torch.zeros_like(x), x], 1) makes them"
        )
    _check_floating(f"{name}: logits", logits)
    if target.is_floating_point():
        raise TypeError(f"{name}: the target holds class numbers, got dtype {target.dtype}; use target.long()")


def _check_sdf(raw: Tensor, sdf: Tensor) -> None:
    _check_floating("the raw sdf", raw)
    per_image = (raw.shape[0], *raw.shape[2:])
    if raw.ndim != 4 or raw.shape[1] != 1 or tuple(sdf.shape) not in (tuple(raw.shape), per_image):
        raise ValueError(
            f"raw (B, 1, H, W) and sdf (B, 1, H, W) or (B, H, W) disagree: {tuple(raw.shape)}, {tuple(sdf.shape)}"
        )
