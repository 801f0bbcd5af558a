"""The fused objective as custom ops: terms and coefficients forward, gradients of all logits backward.

Triton kernels compute it on a GPU, the compiled module on the CPU. The compiled module computes in float32, so
half-precision logits are converted, and the portable backend handles float64 logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native_objective, _triton, portable
from ._derivatives import first_alone
from ._layout import addressable
from ._watched import watched

IGNORE_INDEX = 255  # a target that belongs to no class


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `functional.objective_terms`."""
    return joint_objective_terms([(mask_logits, raw_sdf, boundary_logits)], mask, sdf, boundary)


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `functional.joint_objective_terms`. The result is float64 if any logits are, else float32."""
    logits = [x for prediction in predictions for x in prediction]
    learns_sdf = sdf.requires_grad and torch.is_grad_enabled()  # the kernels differentiate by the predictions alone
    if learns_sdf or _kernels(mask.device.type) is _native_objective:
        classes, dtype = [logits[0].shape[1], logits[2].shape[1]], _accumulation_dtype(logits)
        logits, sdf = [x if x.dtype == dtype else x.to(dtype) for x in logits], sdf.to(dtype)
        if learns_sdf or dtype == torch.float64 or max(classes) > _native_objective.MOST_CLASSES:
            return portable.joint_objective_terms(_sets(logits), mask, sdf, boundary)
        mask, boundary = (_bytes(target, count) for target, count in zip((mask, boundary), classes, strict=True))
    return _Terms.apply(mask.unsqueeze(1), sdf.reshape(logits[1].shape), boundary.unsqueeze(1), *logits)


def _bytes(target: Tensor, classes: int) -> Tensor:
    """Class numbers as uint8 or bool. Numbers outside 0 .. classes-1 become IGNORE_INDEX."""
    if target.dtype in (torch.uint8, torch.bool):
        return target
    target = target.long()
    return torch.where((target >= 0) & (target < classes), target, IGNORE_INDEX).to(torch.uint8)


def _kernels(device_type: str) -> ModuleType:
    """The module that computes: on the CPU the compiled module, unless a test asks for Triton's interpreter."""
    if device_type == "cpu" and not _triton.interprets():
        return _native_objective
    from ..kernels import objective

    return objective


def _forward(logits: Sequence[Tensor], mask: Tensor, sdf: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms (3,), and the coefficients alpha and beta (B, S (K + L)) that the backward pass needs.

    logits: S x (mask (B, K, H, W), sdf (B, 1, H, W), boundary (B, L, H, W)) as one flat list; targets (B, 1, H, W).
    """
    predictions, targets = _sets(map(addressable, logits)), [addressable(x) for x in (mask, sdf, boundary)]
    return _kernels(mask.device.type).forward(predictions, targets, _accumulation_dtype(logits))


_terms = torch.library.custom_op("semimoe_fast::objective_terms", _forward, mutates_args=())


@_terms.register_fake
def _(logits: Sequence[Tensor], mask: Tensor, sdf: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, columns = mask.shape[0], sum(x.shape[1] for x in (*logits[::3], *logits[2::3]))
    like = {"dtype": _accumulation_dtype(logits), "device": mask.device}
    return torch.empty(3, **like), torch.empty(batch, columns, **like), torch.empty(batch, columns, **like)


def _backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    mask: Tensor,
    sdf: Tensor,
    boundary: Tensor,
    alpha: Tensor,
    beta: Tensor,
) -> list[Tensor]:
    """Gradients of the logits, from grad_output (3,), the arguments of `_forward` and its alpha and beta."""
    predictions, targets = _sets(map(addressable, logits)), [addressable(x) for x in (mask, sdf, boundary)]
    gradients = _kernels(mask.device.type).backward(grad_output, predictions, targets, alpha, beta)
    return [x for prediction in gradients for x in prediction]


_gradients = torch.library.custom_op("semimoe_fast::objective_gradients", _backward, mutates_args=())


@_gradients.register_fake
def _(grad_output: Tensor, logits: Sequence[Tensor], *_: Tensor) -> list[Tensor]:
    return [torch.empty_like(addressable(x)) for x in logits]


_gradients.register_autograd(first_alone("the fused objective", "portable"))


class _Terms(torch.autograd.Function):
    """Terms as a differentiable function of the logits.

    On a CPU, passing lists through a custom op and its autograd adds half of the computing time. So this class calls
    the plain functions, and the custom ops only if something must see them and to refuse second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor, sdf: Tensor, boundary: Tensor, *logits: Tensor) -> Tensor:
        compute = _terms if watched(*logits) else _forward
        terms, alpha, beta = compute(logits, mask, sdf, boundary)
        ctx.save_for_backward(mask, sdf, boundary, alpha, beta, *logits)
        return terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mask, sdf, boundary, alpha, beta, *logits = ctx.saved_tensors
        compute = _gradients if torch.is_grad_enabled() or watched(grad_output) else _backward
        return None, None, None, *compute(grad_output, logits, mask, sdf, boundary, alpha, beta)


def _sets(tensors: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """The flat list as S x (mask logits, raw sdf, boundary logits)."""
    flat = iter(tensors)
    return list(zip(flat, flat, flat, strict=True))


def _accumulation_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
