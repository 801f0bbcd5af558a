"""The multi-gate as custom ops: the pass over the features, and the passes over their projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import gate_portable
from ._derivatives import first_alone
from ._layout import alike

refuse_second_derivative = first_alone("the multi-gate", "reference")


def project_experts(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `functional.project_experts`."""
    return apply(features, head_weights, own_weights, own_biases, fused=True)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """See `functional.multi_gate`."""
    return mix_projections(_project(features, head_weights), gate_weights, head_biases)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.pseudo_labels`."""
    with torch.no_grad():
        return label_projections(_project(features, head_weights), gate_weights, head_biases)


def mix_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `functional.mix_projections`."""
    if projections.dtype == torch.float64:  # the kernels compute in float32
        return gate_portable.mix_projections(projections, gate_weights, head_biases)
    return tuple(_mix(projections, gate_weights, torch.cat(list(head_biases)), [len(bias) for bias in head_biases]))


def label_projections(
    projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.label_projections`."""
    if projections.dtype == torch.float64:
        return gate_portable.label_projections(projections, gate_weights, head_biases)
    with torch.no_grad():
        return _labels(projections, gate_weights, torch.cat(list(head_biases)), len(head_biases[0]))


def _project(features: Sequence[Tensor], head_weights: Sequence[Tensor]) -> Tensor:
    """Only the projections of `project_experts`, for experts without own heads."""
    empty = features[0].new_zeros(0, features[0].shape[1])
    return project_experts(features, head_weights, [empty] * len(features), [empty[:, 0]] * len(features))[1]


@torch.library.custom_op("semimoe_fast::mix_projections", mutates_args=())
def _mix(projections: Tensor, gate_weights: Tensor, biases: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """projections (B, E, O, H, W), gate_weights (B, T, E), biases (O,), T row counts O_k -> T x (B, O_k, H, W)."""
    from ..kernels import mix_projections

    return mix_projections.forward(projections.contiguous(), gate_weights.contiguous(), biases, rows)


@_mix.register_fake
def _(projections: Tensor, gate_weights: Tensor, biases: Tensor, rows: Sequence[int]) -> list[Tensor]:
    batch, _, _, height, width = projections.shape
    return [projections.new_empty(batch, o, height, width) for o in rows]


@torch.library.custom_op("semimoe_fast::mix_projections_gradients", mutates_args=())
def _mix_gradients(
    projections: Tensor, gate_weights: Tensor, grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of `_mix` and grad_outputs T x (B, O_k, H, W) -> gradients of projections, gate weights and biases."""
    from ..kernels import mix_projections

    return mix_projections.backward(
        projections.contiguous(), gate_weights.contiguous(), [grad.contiguous() for grad in grad_outputs]
    )


@_mix_gradients.register_fake
def _(projections: Tensor, gate_weights: Tensor, grad_outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(projections, memory_format=torch.contiguous_format),
        gate_weights.new_empty(gate_weights.shape, dtype=torch.float32),
        gate_weights.new_empty(projections.shape[2], dtype=torch.float32),
    )


def _save_mix_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    projections, gate_weights, biases, _ = inputs
    ctx.biases_dtype = biases.dtype
    ctx.save_for_backward(projections, gate_weights)


def _mix_backward(ctx: Any, grad_outputs: Sequence[Tensor]) -> tuple:
    projections, gate_weights = ctx.saved_tensors
    grad_projections, grad_weights, grad_biases = _mix_gradients(projections, gate_weights, grad_outputs)
    return grad_projections, grad_weights.to(gate_weights.dtype), grad_biases.to(ctx.biases_dtype), None


@torch.library.custom_op("semimoe_fast::label_projections", mutates_args=())
def _labels(projections: Tensor, gate_weights: Tensor, biases: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """projections (B, E, K + 1 + L, H, W), gate_weights (B, 3, E), biases (K + 1 + L,), K classes
    -> mask uint8 (B, H, W), sdf (B, 1, H, W), boundary uint8 (B, H, W)."""
    from ..kernels import mix_projections

    return mix_projections.labels(projections.contiguous(), gate_weights.contiguous(), biases, classes)


@_labels.register_fake
def _(projections: Tensor, gate_weights: Tensor, biases: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, height, width = projections.shape
    mask = projections.new_empty(batch, height, width, dtype=torch.uint8)
    return mask, projections.new_empty(batch, 1, height, width), torch.empty_like(mask)


_mix.register_autograd(_mix_backward, setup_context=_save_mix_for_backward)
_mix_gradients.register_autograd(refuse_second_derivative)


# ---------------------------------------------------------------------------------------- projection of the experts


def apply(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
    fused: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `functional.project_experts`."""
    weights, biases = torch.cat([*head_weights, *own_weights]), torch.cat(list(own_biases))
    means, projections, own = _project_experts(features, weights, biases, [len(bias) for bias in own_biases], fused)
    return means, projections, tuple(own)


def _kernels(x: Tensor, fused: bool) -> Any:
    """The module whose `forward` and `backward` compute: plain PyTorch for float64 and for too many channels."""
    if not fused or x.dtype == torch.float64:
        return gate_portable
    from ..kernels import project_experts

    return project_experts if x.shape[1] <= project_experts.MOST_CHANNELS else gate_portable


@torch.library.custom_op("semimoe_fast::project_experts", mutates_args=())
def _project_experts(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int], fused: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """features E x (B, C, H, W), weights of all heads and own heads (O + sum O_e, C), own_biases (sum O_e,), E row
    counts O_e -> means (B, E, C), projections (B, E, O, H, W), own predictions E x (B, O_e, H, W)."""
    with torch.autocast(weights.device.type, enabled=False):
        module = _kernels(features[0], fused)
        return module.forward(alike(features), weights.contiguous(), own_biases.contiguous(), own_rows)


@_project_experts.register_fake
def _(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int], fused: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = features[0]
    batch, channels, height, width = x.shape
    means = x.new_empty(batch, len(features), channels, dtype=torch.promote_types(x.dtype, torch.float32))
    projections = x.new_empty(batch, len(features), weights.shape[0] - sum(own_rows), height, width)
    return means, projections, [x.new_empty(batch, rows, height, width) for rows in own_rows]


@torch.library.custom_op("semimoe_fast::project_experts_gradients", mutates_args=())
def _expert_gradients(
    features: Sequence[Tensor],
    weights: Tensor,
    own_rows: Sequence[int],
    grad_means: Tensor | None,
    grad_projections: Tensor | None,
    grad_own: Sequence[Tensor],
    fused: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the features, with their dtype and strides, and of weights and own_biases, in float32 or float64.

    Takes arguments of `_project_experts` and gradients of its results; unused results have None, or an empty grad_own.
    """
    with torch.autocast(weights.device.type, enabled=False):
        grad_features, *grad_parameters = _kernels(features[0], fused).backward(
            alike(features),
            weights.contiguous(),
            own_rows,
            None if grad_means is None else grad_means.contiguous(),
            None if grad_projections is None else grad_projections.contiguous(),
            [grad.contiguous() for grad in grad_own] or None,
        )
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return grad_features, *(gradient.to(dtype) for gradient in grad_parameters)


@_expert_gradients.register_fake
def _(
    features: Sequence[Tensor], weights: Tensor, own_rows: Sequence[int], *_: object
) -> tuple[list[Tensor], Tensor, Tensor]:
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return (
        [torch.empty_like(x) for x in alike(features)],
        weights.new_empty(weights.shape, dtype=dtype),
        weights.new_empty(sum(own_rows), dtype=dtype),
    )


def _save_experts_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # unused results, such as projections for pseudo-labels, get None
    features, weights, own_biases, ctx.own_rows, ctx.fused = inputs
    ctx.biases_dtype = own_biases.dtype
    ctx.save_for_backward(*features, weights)


def _experts_backward(
    ctx: Any,
    grad_means: Tensor | None,
    grad_projections: Tensor | None,
    grad_own: Sequence[Tensor | None] | None,
) -> tuple:
    *features, weights = ctx.saved_tensors
    own = []  # stays empty if no own prediction is used; else unused ones get zeros
    if any(grad is not None for grad in grad_own or ()):
        x = features[0]
        each = zip(grad_own, ctx.own_rows, strict=True)
        own = [x.new_zeros(x.shape[0], rows, *x.shape[2:]) if grad is None else grad for grad, rows in each]
    grad_features, grad_weights, grad_biases = _expert_gradients(
        features, weights, ctx.own_rows, grad_means, grad_projections, own, ctx.fused
    )
    return grad_features, grad_weights.to(weights.dtype), grad_biases.to(ctx.biases_dtype), None, None


_project_experts.register_autograd(_experts_backward, setup_context=_save_experts_for_backward)
_expert_gradients.register_autograd(refuse_second_derivative)
