"""The fused adaptive loss as custom ops, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import portable
from ._derivatives import first_alone


def adaptive_loss(
    terms: Tensor, log_vars: Tensor, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4
) -> Tensor:
    """See `functional.adaptive_loss`."""
    if torch.float64 in (terms.dtype, log_vars.dtype):  # the kernel computes in float32
        return portable.adaptive_loss(terms, log_vars, coefficients, regularizer)
    total = _forward(terms, log_vars, list(coefficients), regularizer)
    return total.to(torch.promote_types(terms.dtype, log_vars.dtype))


@torch.library.custom_op("semimoe_fast::adaptive_loss", mutates_args=())
def _forward(terms: Tensor, log_vars: Tensor, coefficients: Sequence[float], regularizer: float) -> Tensor:
    """terms (T,), log_vars (T,), T coefficients, regularizer -> float32 ()."""
    from ..kernels import adaptive

    return adaptive.forward(terms.contiguous(), log_vars.contiguous(), coefficients, regularizer)


@_forward.register_fake
def _(terms: Tensor, log_vars: Tensor, coefficients: Sequence[float], regularizer: float) -> Tensor:
    return terms.new_empty((), dtype=torch.float32)


@torch.library.custom_op("semimoe_fast::adaptive_loss_gradients", mutates_args=())
def _gradients(
    grad_output: Tensor, terms: Tensor, log_vars: Tensor, coefficients: Sequence[float], regularizer: float
) -> tuple[Tensor, Tensor]:
    """grad_output () and the arguments of the forward op -> gradients of terms (T,) and log_vars (T,)."""
    from ..kernels import adaptive

    return adaptive.backward(grad_output, terms.contiguous(), log_vars.contiguous(), coefficients, regularizer)


@_gradients.register_fake
def _(grad_output: Tensor, terms: Tensor, log_vars: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(terms, memory_format=torch.contiguous_format),
        torch.empty_like(log_vars, memory_format=torch.contiguous_format),
    )


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    terms, log_vars, ctx.coefficients, ctx.regularizer = inputs
    ctx.save_for_backward(terms, log_vars)


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    return *_gradients(grad_output, *ctx.saved_tensors, ctx.coefficients, ctx.regularizer), None, None


_forward.register_autograd(_backward, setup_context=_save_for_backward)
_gradients.register_autograd(first_alone("the fused adaptive loss", "portable"))
