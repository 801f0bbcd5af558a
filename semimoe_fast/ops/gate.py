"""The fused multi-gate: the pass over the features, and the custom ops of the passes over their products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import portable_gate
from ..expert_products import apply, refuse


def expert_products(
    features: Sequence[Tensor],
    head_weights: Sequence[Tensor],
    own_weights: Sequence[Tensor],
    own_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `functional.expert_products`."""
    return apply(features, head_weights, own_weights, own_biases, fused=True)


def multi_gate(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """See `functional.multi_gate`."""
    return mix_products(_products_alone(features, head_weights), gate_weights, head_biases)


def pseudo_labels(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.pseudo_labels`."""
    with torch.no_grad():
        return label_products(_products_alone(features, head_weights), gate_weights, head_biases)


def mix_products(products: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `functional.mix_products`."""
    if products.dtype == torch.float64:  # the kernels accumulate in float32
        return portable_gate.mix_products(products, gate_weights, head_biases)
    return tuple(_mix(products, gate_weights, torch.cat(list(head_biases)), [len(bias) for bias in head_biases]))


def label_products(
    products: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.label_products`."""
    if products.dtype == torch.float64:
        return portable_gate.label_products(products, gate_weights, head_biases)
    with torch.no_grad():
        return _labels(products, gate_weights, torch.cat(list(head_biases)), len(head_biases[0]))


def _products_alone(features: Sequence[Tensor], head_weights: Sequence[Tensor]) -> Tensor:
    nothing = features[0].new_zeros(0, features[0].shape[1])
    return expert_products(features, head_weights, [nothing] * len(features), [nothing[:, 0]] * len(features))[1]


@torch.library.custom_op("semimoe_fast::mix_products", mutates_args=())
def _mix(products: Tensor, gate_weights: Tensor, biases: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """(B, E, O, H, W), (B, T, E), (O,), T numbers O_k -> T x (B, O_k, H, W)."""
    from ..kernels import mix

    return mix.forward(products.contiguous(), gate_weights.contiguous(), biases, rows)


@_mix.register_fake
def _(products: Tensor, gate_weights: Tensor, biases: Tensor, rows: Sequence[int]) -> list[Tensor]:
    batch, _, _, height, width = products.shape
    return [products.new_empty(batch, o, height, width) for o in rows]


@torch.library.custom_op("semimoe_fast::mix_products_gradients", mutates_args=())
def _mix_gradients(
    products: Tensor, gate_weights: Tensor, grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op above took, and gradients T x (B, O_k, H, W) -> those of products, gate weights and biases."""
    from ..kernels import mix

    return mix.backward(products.contiguous(), gate_weights.contiguous(), [grad.contiguous() for grad in grad_outputs])


@_mix_gradients.register_fake
def _(products: Tensor, gate_weights: Tensor, grad_outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(products, memory_format=torch.contiguous_format),
        gate_weights.new_empty(gate_weights.shape, dtype=torch.float32),
        gate_weights.new_empty(products.shape[2], dtype=torch.float32),
    )


def _remember_mix(ctx, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ANN001
    products, gate_weights, biases, _ = inputs
    ctx.biases_dtype = biases.dtype
    ctx.save_for_backward(products, gate_weights)


def _differentiate_mix(ctx, grad_outputs: Sequence[Tensor]) -> tuple:  # noqa: ANN001
    products, gate_weights = ctx.saved_tensors
    of_products, of_weights, of_biases = _mix_gradients(products, gate_weights, grad_outputs)
    return of_products, of_weights.to(gate_weights.dtype), of_biases.to(ctx.biases_dtype), None


@torch.library.custom_op("semimoe_fast::label_products", mutates_args=())
def _labels(products: Tensor, gate_weights: Tensor, biases: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, E, K + 1 + L, H, W), (B, 3, E), (K + 1 + L,), K -> uint8 (B, H, W), (B, 1, H, W), uint8 (B, H, W)."""
    from ..kernels import mix

    return mix.labels(products.contiguous(), gate_weights.contiguous(), biases, classes)


@_labels.register_fake
def _(products: Tensor, gate_weights: Tensor, biases: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, height, width = products.shape
    mask = products.new_empty(batch, height, width, dtype=torch.uint8)
    return mask, products.new_empty(batch, 1, height, width), torch.empty_like(mask)


_mix.register_autograd(_differentiate_mix, setup_context=_remember_mix)
_mix_gradients.register_autograd(refuse)
