"""The losses in fast plain PyTorch: same results as `reference`, their gradients in closed form beside them.

Both dice losses are means over images and classes of 1 - ratio, ratio = (2 overlap + e) / (mass + e), with
overlap = sum P T, and mass = sum (P^2 + T), e = 1 (squared) or mass = sum (P + T), e = 1e-8 (soft). So with n images
times classes

    dL/dP = T alpha + beta * (P or 1),   alpha = -2 / (n (mass + e)),   beta = ratio / (n (mass + e)) * (2 or 1),

and the softmax passes P_k (g_k - sum_j P_j g_j) on, g = dL/dP; for two classes that is +-P_0 P_1 (g_1 - g_0).

On a CPU what counts is the number of passes, and that their operands are in the cache. Hence one image after the other,
loss and gradient together, memory used again, and no Boolean tensor on the way. The backward pass only scales the
gradients. Everything happens in at least float32.

Source of the formulas: Semi-MoE, arXiv 2509.13834.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SQUARED_DICE, TANH_MSE, SOFT_DICE = range(3)  # in the order of the objective terms
LARGEST = 80  # exp of it is far from overflow, and of its negative far below every rounding error


def squared_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.squared_dice_loss`; at least float32 inside."""
    return _evaluate([logits], [target], [SQUARED_DICE])[0]


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See `reference.soft_dice_loss`; at least float32 inside."""
    return _evaluate([logits], [target], [SOFT_DICE])[0]


def tanh_mse_loss(raw: Tensor, sdf: Tensor) -> Tensor:
    """See `reference.tanh_mse_loss`; at least float32 inside."""
    return _evaluate([raw], [sdf], [TANH_MSE])[0]


def objective_terms(
    mask_logits: Tensor, raw_sdf: Tensor, boundary_logits: Tensor, mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `reference.objective_terms`."""
    return joint_objective_terms([(mask_logits, raw_sdf, boundary_logits)], mask, sdf, boundary)


def joint_objective_terms(
    predictions: Sequence[Sequence[Tensor]], mask: Tensor, sdf: Tensor, boundary: Tensor
) -> Tensor:
    """See `reference.joint_objective_terms`."""
    flat = [x for prediction in predictions for x in prediction]
    targets, kinds = [mask, sdf, boundary], [SQUARED_DICE, TANH_MSE, SOFT_DICE]
    return _evaluate(flat, targets * len(predictions), kinds * len(predictions)).view(-1, 3).sum(0)


def _evaluate(predictions: list[Tensor], targets: list[Tensor], kinds: list[int]) -> Tensor:
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in predictions)
    return _losses(predictions, targets, kinds, differentiate)[0]


@torch.library.custom_op("semimoe_fast::losses", mutates_args=())
def _losses(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], kinds: Sequence[int], differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    """n losses, of predictions (B, K, H, W) against targets -> (n,), and if asked for the gradient of each."""
    dtype = _accumulation_dtype(*predictions)
    losses, gradients = [], []
    for prediction, target, kind in zip(predictions, targets, kinds, strict=True):
        x = prediction.to(_accumulation_dtype(prediction))
        gradient = torch.empty_like(x) if differentiate else None
        losses.append(_tanh_mse(x, target, gradient) if kind == TANH_MSE else _dice(x, target, kind, gradient))
        gradients += [] if gradient is None else [gradient]
    return torch.stack([loss.to(dtype) for loss in losses]), gradients


@_losses.register_fake
def _(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], kinds: Sequence[int], differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.empty_like(x, dtype=_accumulation_dtype(x)) for x in predictions] if differentiate else []
    return predictions[0].new_empty(len(kinds), dtype=_accumulation_dtype(*predictions)), gradients


@torch.library.custom_op("semimoe_fast::scaled_gradients", mutates_args=())
def _scaled(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Each gradient times the gradient of its loss, (n,)."""
    return [gradient * scale for gradient, scale in zip(gradients, upstream.unbind(), strict=True)]


@_scaled.register_fake
def _(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the outputs that nobody differentiates
    ctx.dtypes = [x.dtype for x in inputs[0]]
    ctx.save_for_backward(*output[1])


def _differentiate(ctx: Any, upstream: Tensor | None, _: list[Tensor | None]) -> tuple:
    gradients = [None] * len(ctx.dtypes)
    if upstream is not None:
        scaled = _scaled(ctx.saved_tensors, upstream)
        gradients = [gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)]
    return gradients, [None] * len(gradients), None, None


def _refuse(ctx: Any, *_: object) -> None:
    raise RuntimeError("the portable losses have first derivatives only: for second ones set SEMIMOE_BACKEND=reference")


_losses.register_autograd(_differentiate, setup_context=_remember)
_scaled.register_autograd(_refuse)


def _dice(logits: Tensor, target: Tensor, kind: int, gradient: Tensor | None) -> Tensor:
    """The loss (), of (B, K, H, W) and (B, H, W); writes its gradient."""
    squared = kind == SQUARED_DICE
    smooth, ratios = 1.0 if squared else 1e-8, logits.new_empty(logits.shape[:2])
    p, t = (logits.new_empty(logits.shape[1:]) for _ in range(2))
    for b, logits_b in enumerate(logits):
        _softmax(logits_b, p)
        for k, t_k in enumerate(t):
            torch.eq(target[b], k, out=t_k)
        mass = (_dots(p, p) if squared else p.sum((1, 2))) + t.sum((1, 2)) + smooth
        ratio = torch.div(2 * _dots(p, t) + smooth, mass, out=ratios[b])
        if gradient is not None:
            alpha = -2 / ratios.numel() / mass[:, None, None]
            beta = alpha * ratio[:, None, None] * (-1 if squared else -0.5)
            g = t.mul_(alpha)
            _softmax_adjoint(p, g.addcmul_(p, beta) if squared else g.add_(beta), gradient[b])
    return (1 - ratios).mean()


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
    torch.sub(g[1], g[0], out=gradient[1]).mul_(p[0]).mul_(p[1])
    torch.neg(gradient[1], out=gradient[0])


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products over the pixels, (K, H, W) -> (K,). Not as one matrix product, which autocast would round."""
    return torch.stack([torch.dot(a_k, b_k) for a_k, b_k in zip(a.flatten(1), b.flatten(1), strict=True)])


def _tanh_mse(raw: Tensor, sdf: Tensor, gradient: Tensor | None) -> Tensor:
    """The loss (), of (B, 1, H, W) and (B, 1, H, W) or (B, H, W); writes 2 (tanh - sdf) (1 - tanh^2) / N."""
    tanh = raw.tanh()
    difference = tanh - sdf.reshape(raw.shape)
    if gradient is not None:
        torch.mul(difference, 2 / max(1, raw.numel()), out=gradient)
        gradient.addcmul_(gradient, tanh.square_(), value=-1)
    return difference.square_().mean()


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
