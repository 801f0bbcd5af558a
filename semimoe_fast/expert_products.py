"""The pass over the experts' features as one differentiable operation, in plain PyTorch or by the fused kernel.

Both compute the same formulas, forward and backward (portable_gate.py, kernels/expert_products.py), behind one custom
op, so that torch.compile and autograd see one node that reads the features once each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import portable_gate
from ._layout import alike


def apply(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
    fused: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `functional.expert_products`."""
    weights, biases = torch.cat([*head_weights, *own_weights]), torch.cat(list(own_biases))
    means, products, own = _expert_products(features, weights, biases, [len(bias) for bias in own_biases], fused)
    return means, products, tuple(own)


def refuse(ctx, *_: object) -> None:  # noqa: ANN001
    """The derivative of a gradient."""
    raise RuntimeError("the multi-gate has first derivatives only: for second ones set SEMIMOE_BACKEND=reference")


def _kernels(x: Tensor, fused: bool) -> Any:
    """The module whose `forward` and `backward` compute: the plain one for what the kernels are not made for."""
    if not fused or x.dtype == torch.float64:
        return portable_gate
    from .kernels import expert_products

    return expert_products if x.shape[1] <= expert_products.MOST_CHANNELS else portable_gate


@torch.library.custom_op("semimoe_fast::expert_products", mutates_args=())
def _expert_products(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int], fused: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """E x (B, C, H, W), (O + sum O_e, C), (sum O_e,), E x O_e -> (B, E, C), (B, E, O, H, W), E x (B, O_e, H, W)."""
    with torch.autocast(weights.device.type, enabled=False):
        module = _kernels(features[0], fused)
        return module.forward(alike(features), weights.contiguous(), own_biases.contiguous(), own_rows)


@_expert_products.register_fake
def _(
    features: Sequence[Tensor], weights: Tensor, own_biases: Tensor, own_rows: Sequence[int], fused: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = features[0]
    batch, channels, height, width = x.shape
    means = x.new_empty(batch, len(features), channels, dtype=torch.promote_types(x.dtype, torch.float32))
    products = x.new_empty(batch, len(features), weights.shape[0] - sum(own_rows), height, width)
    return means, products, [x.new_empty(batch, rows, height, width) for rows in own_rows]


@torch.library.custom_op("semimoe_fast::expert_products_gradients", mutates_args=())
def _expert_gradients(
    features: Sequence[Tensor],
    weights: Tensor,
    own_rows: Sequence[int],
    grad_means: Tensor | None,
    grad_products: Tensor | None,
    grad_own: Sequence[Tensor],
    fused: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the op above took, and the gradients of its results, where there are any -> those of its tensors.

    Of the features as these are, of the parameters in at least float32.
    """
    with torch.autocast(weights.device.type, enabled=False):
        of_features, *of_parameters = _kernels(features[0], fused).backward(
            alike(features),
            weights.contiguous(),
            own_rows,
            None if grad_means is None else grad_means.contiguous(),
            None if grad_products is None else grad_products.contiguous(),
            [grad.contiguous() for grad in grad_own] or None,
        )
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return of_features, *(gradient.to(dtype) for gradient in of_parameters)


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


def _remember_experts(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)  # pseudo-labels need no gradient of products and means
    features, weights, own_biases, ctx.own_rows, ctx.fused = inputs
    ctx.biases_dtype = own_biases.dtype
    ctx.save_for_backward(*features, weights)


def _differentiate_experts(
    ctx,  # noqa: ANN001
    grad_means: Tensor | None,
    grad_products: Tensor | None,
    grad_own: Sequence[Tensor | None] | None,
) -> tuple:
    *features, weights = ctx.saved_tensors
    own = []  # or all of them, where any is asked for
    if any(grad is not None for grad in grad_own or ()):
        x = features[0]
        each = zip(grad_own, ctx.own_rows, strict=True)
        own = [x.new_zeros(x.shape[0], rows, *x.shape[2:]) if grad is None else grad for grad, rows in each]
    of_features, of_weights, of_biases = _expert_gradients(
        features, weights, ctx.own_rows, grad_means, grad_products, own, ctx.fused
    )
    return of_features, of_weights.to(weights.dtype), of_biases.to(ctx.biases_dtype), None, None


_expert_products.register_autograd(_differentiate_experts, setup_context=_remember_experts)
_expert_gradients.register_autograd(refuse)
