"""The losses in fast plain PyTorch: same results as `reference`, with the gradient of the dice losses in closed form.

Both dice losses are means over images and classes of 1 - ratio, ratio = (2 overlap + e) / (mass + e), with
overlap = sum P T and mass = sum (P^2 + T), e = 1 (squared) or sum (P + T), e = 1e-8 (soft). So with n images times classes

    dL/dP = T alpha + beta * (P or 1),   alpha = -2 / (n (mass + e)),   beta = ratio / (n (mass + e)) * (2 or 1),

and the softmax passes P_k (g_k - sum_j P_j g_j) on, g = dL/dP. Everything happens in at least float32, in few passes that
reuse memory: on a CPU a fresh tensor costs as much as the arithmetic that fills it, and a Boolean one twice that.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIXELS = (2, 3)


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
    """(B, K, H, W), (B, H, W) -> the loss, and for the backward pass P (B, K, H, W), alpha and beta (B, K, 1, 1)."""
    p = _softmax(logits.to(_accumulation_dtype(logits)))
    t = _one_hot(target, p)
    count = t.sum(PIXELS, keepdim=True)
    overlap = t.mul_(p).sum(PIXELS, keepdim=True)
    mass = count + (torch.mul(p, p, out=t) if squared else p).sum(PIXELS, keepdim=True)
    smooth = 1.0 if squared else 1e-8
    ratio = (2 * overlap + smooth) / (mass + smooth)
    scale = 1 / ((mass + smooth) * ratio.numel())
    return (1 - ratio).mean(), p, -2 * scale, (2 if squared else 1) * ratio * scale


@_dice.register_fake
def _(logits: Tensor, target: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = torch.empty_like(logits, dtype=_accumulation_dtype(logits))
    alpha, beta = (p.new_empty(*p.shape[:2], 1, 1) for _ in range(2))
    return p.new_empty(()), p, alpha, beta


@torch.library.custom_op("semimoe_fast::dice_gradient", mutates_args=())
def _dice_gradient(p: Tensor, target: Tensor, alpha: Tensor, beta: Tensor, squared: bool) -> Tensor:
    """What `_dice` took and gave -> the gradient of its logits."""
    g = _one_hot(target, p).mul_(alpha)
    g = g.addcmul_(p, beta) if squared else g.add_(beta)
    return g.sub_((p * g).sum(1, keepdim=True)).mul_(p)


@_dice_gradient.register_fake
def _(p: Tensor, target: Tensor, alpha: Tensor, beta: Tensor, squared: bool) -> Tensor:
    return torch.empty_like(p)


def _remember(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ANN001
    logits, target, ctx.squared = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(target, *output[1:])


def _differentiate(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
    target, p, alpha, beta = ctx.saved_tensors
    return _dice_gradient(p, target, upstream * alpha, upstream * beta, ctx.squared).to(ctx.dtype), None, None


def _refuse(ctx, *_: Tensor) -> None:  # noqa: ANN001
    raise RuntimeError("the portable losses have first derivatives only: for second ones set SEMIMOE_BACKEND=reference")


_dice.register_autograd(_differentiate, setup_context=_remember)
_dice_gradient.register_autograd(_refuse)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over dim 1. Of two classes it is a sigmoid of their difference, at a third of the time on a CPU."""
    if logits.shape[1] != 2 or logits.numel() == 0:
        return logits.softmax(1)
    p = torch.empty_like(logits)
    torch.sub(logits[:, 0], logits[:, 1], out=p[:, 0])
    torch.neg(p[:, 0], out=p[:, 1])
    p.sigmoid_()
    largest = logits.amax((1, 2, 3))[:, None]
    p[..., 0, 0] += largest - largest  # NaN where +inf is among the logits of an image, as its softmax has it
    return p


def _one_hot(target: Tensor, p: Tensor) -> Tensor:
    """T (B, K, H, W) like P, without a Boolean tensor on the way."""
    t = torch.empty_like(p)
    for k in range(p.shape[1]):
        torch.eq(target, k, out=t[:, k])
    return t


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
