"""Custom ops of the fused objective: terms and their coefficients forward, gradients of all logits backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `functional.objective_terms`."""
    return joint_objective_terms([(mask_logits, raw_sdf, boundary_logits)], mask, sdf, boundary)


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `functional.joint_objective_terms`. Computed and returned in float32; in float64 if any logits are."""
    logits = [x for prediction in predictions for x in prediction]
    return _terms(logits, mask[:, None], sdf.reshape(logits[1].shape), boundary[:, None])[0]


@torch.library.custom_op("semimoe_fast::objective_terms", mutates_args=())
def _terms(logits: Sequence[Tensor], mask: Tensor, sdf: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S x (mask (B, K, H, W), sdf (B, 1, H, W), boundary (B, L, H, W)) in one list, targets (B, 1, H, W) -> terms (3,),
    and what the backward pass needs of the sums: alpha and beta (B, S (K + L))."""
    from ..kernels import objective

    targets = [_addressable(x) for x in (mask, sdf, boundary)]
    return objective.forward(_sets(_addressable(x) for x in logits), targets, _accumulation_dtype(logits))


@_terms.register_fake
def _(logits: Sequence[Tensor], mask: Tensor, sdf: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, columns = mask.shape[0], sum(x.shape[1] for x in (*logits[::3], *logits[2::3]))
    like = {"dtype": _accumulation_dtype(logits), "device": mask.device}
    return torch.empty(3, **like), torch.empty(batch, columns, **like), torch.empty(batch, columns, **like)


@torch.library.custom_op("semimoe_fast::objective_gradients", mutates_args=())
def _gradients(
    upstream: Tensor,
    logits: Sequence[Tensor],
    mask: Tensor,
    sdf: Tensor,
    boundary: Tensor,
    alpha: Tensor,
    beta: Tensor,
) -> list[Tensor]:
    """Gradients of the terms (3,) and what `_terms` took and gave -> gradients of the logits, in their order."""
    from ..kernels import objective

    targets = [_addressable(x) for x in (mask, sdf, boundary)]
    gradients = objective.backward(upstream, _sets(_addressable(x) for x in logits), targets, alpha, beta)
    return [x for prediction in gradients for x in prediction]


@_gradients.register_fake
def _(upstream: Tensor, logits: Sequence[Tensor], *_: Tensor) -> list[Tensor]:
    return [torch.empty_like(_addressable(x)) for x in logits]


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the outputs that nobody differentiates
    logits, *targets = inputs
    _, alpha, beta = output
    ctx.save_for_backward(*logits, *targets, alpha, beta)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: object) -> tuple:
    *logits, mask, sdf, boundary, alpha, beta = ctx.saved_tensors
    if upstream is None:
        return [None] * len(logits), None, None, None
    return _gradients(upstream, logits, mask, sdf, boundary, alpha, beta), None, None, None


def _refuse(ctx: Any, *_: object) -> None:
    raise RuntimeError("the fused objective has first derivatives only: for second ones set SEMIMOE_BACKEND=reference")


_terms.register_autograd(_differentiate, setup_context=_remember)
_gradients.register_autograd(_refuse)


def _sets(tensors: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """The flat list as S x (mask logits, raw sdf, boundary logits)."""
    flat = iter(tensors)
    return list(zip(flat, flat, flat, strict=True))


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy, in whose (H, W) planes every pixel is as far from the one before as the next."""
    height, width = x.shape[2:]
    return x if 1 in (height, width) or x.stride(2) == width * x.stride(3) else x.contiguous()


def _accumulation_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
