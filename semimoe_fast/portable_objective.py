"""The losses in fast plain PyTorch: same results as `reference`, the dice losses with gradients in closed form.

Both dice losses are means over images and classes of 1 - ratio, ratio = (2 overlap + e) / (mass + e), with
overlap = sum P T, and mass = sum (P^2 + T), e = 1 (squared) or mass = sum (P + T), e = 1e-8 (soft). So with n images
times classes

    dL/dP = T alpha + beta * (P or 1),   alpha = -2 / (n (mass + e)),   beta = ratio / (n (mass + e)) * (2 or 1),

and the softmax passes P_k (g_k - sum_j P_j g_j) on, g = dL/dP; for two classes that is +-P_0 P_1 (g_1 - g_0).

On a CPU what counts is the number of passes, and that their operands stay in the cache: one image after the other,
memory used again, no Boolean tensor on the way. Everything happens in at least float32.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 80  # exp of it is far from overflow, and of its negative far below every rounding error


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.squared_dice_loss`; at least float32 inside."""
    return _dice(logits, target, True)[0]


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.soft_dice_loss`; at least float32 inside."""
    return _dice(logits, target, False)[0]


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """See `reference.tanh_mse_loss`; at least float32 inside."""
    dtype = _accumulation_dtype(raw)
    return torch.nn.functional.mse_loss(raw.to(dtype).tanh(), sdf.reshape(raw.shape).to(dtype))


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `reference.objective_terms`."""
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
    """See `reference.joint_objective_terms`."""
    return sum(objective_terms(*prediction, mask, sdf, boundary) for prediction in predictions)


@torch.library.custom_op("semimoe_fast::dice", mutates_args=())
def _dice(logits: Tensor, target: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, K, H, W), (B, H, W) -> the loss, and for the backward pass P (B, K, H, W), alpha and beta (B, K)."""
    logits = logits.to(_accumulation_dtype(logits))
    p = torch.empty_like(logits, memory_format=torch.contiguous_format)
    t = p.new_empty(target.shape[1:])
    sums = []
    for z_b, p_b, target_b in zip(logits, p, target, strict=True):
        _softmax(z_b, p_b)
        for k, p_k in enumerate(p_b):
            torch.eq(target_b, k, out=t)
            sums += [_dot(p_k, t), _dot(p_k, p_k) if squared else p_k.sum(), t.sum()]
    overlap, mass, count = (torch.stack(sums) if sums else p.new_empty(0)).view(*p.shape[:2], 3).unbind(2)
    smooth = 1.0 if squared else 1e-8
    below = mass + count + smooth
    ratio = (2 * overlap + smooth) / below
    scale = 1 / (below * ratio.numel())
    return (1 - ratio).mean(), p, -2 * scale, (2 if squared else 1) * ratio * scale


@_dice.register_fake
def _(logits: Tensor, target: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = logits.new_empty(logits.shape, dtype=_accumulation_dtype(logits))
    return p.new_empty(()), p, p.new_empty(p.shape[:2]), p.new_empty(p.shape[:2])


@torch.library.custom_op("semimoe_fast::dice_gradient", mutates_args=())
def _dice_gradient(
    logits: Tensor, target: Tensor, p: Tensor, alpha: Tensor, beta: Tensor, upstream: Tensor, squared: bool
) -> Tensor:
    """What `_dice` took and gave, and the gradient of the loss -> the gradient of the logits, laid out like them."""
    gradient = torch.empty_like(logits)
    g = torch.empty_like(p[:1])[0] if len(p) else p
    for gradient_b, p_b, target_b, alpha_b, beta_b in zip(
        gradient, p, target, alpha * upstream, beta * upstream, strict=True
    ):
        for g_k, p_k, k, alpha_k, beta_k in zip(g, p_b, range(len(p_b)), alpha_b, beta_b, strict=True):
            torch.eq(target_b, k, out=g_k).mul_(alpha_k)
            g_k.addcmul_(p_k, beta_k) if squared else g_k.add_(beta_k)
        _softmax_adjoint(p_b, g, gradient_b)
    return gradient


@_dice_gradient.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the outputs that nobody differentiates
    logits, target, ctx.squared = inputs
    ctx.save_for_backward(logits, target, *output[1:])


def _differentiate(ctx: Any, upstream: Tensor | None, *_: object) -> tuple[Tensor | None, None, None]:
    if upstream is None:
        return None, None, None
    return _dice_gradient(*ctx.saved_tensors, upstream, ctx.squared), None, None


def _refuse(ctx: Any, *_: object) -> None:
    raise RuntimeError("the portable losses have first derivatives only: for second ones set SEMIMOE_BACKEND=reference")


_dice.register_autograd(_differentiate, setup_context=_remember)
_dice_gradient.register_autograd(_refuse)


def _softmax(logits: Tensor, p: Tensor) -> None:
    """Softmax of one image, (K, H, W), into P; of two classes as 1 / (1 + exp), at a third of the time on a CPU."""
    if len(p) != 2 or p.numel() == 0:
        torch.softmax(logits, 0, out=p)
        return
    p_0, p_1 = p
    torch.sub(*logits, out=p_0).clamp_(max=LARGEST).exp_()
    torch.add(p_0, 1, out=p_1).reciprocal_()
    p_0.mul_(p_1)
    largest = logits.amax()
    p[:, 0, 0] += largest - largest  # NaN where a logit is +inf, as its softmax would have it


def _softmax_adjoint(p: Tensor, g: Tensor, gradient: Tensor) -> None:
    """P_k (g_k - sum_j P_j g_j) of one image, (K, H, W), into the gradient; g is overwritten."""
    if len(p) != 2:
        torch.mul(g.sub_((p * g).sum(0)), p, out=gradient)
        return
    slope = g[1].sub_(g[0]).mul_(p[0]).mul_(p[1])
    gradient[1] = slope
    gradient[0] = slope.neg_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the pixels of a plane."""
    return torch.dot(a.view(-1), b.view(-1))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
