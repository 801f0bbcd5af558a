"""The skip connections of a U-Net: max pooling of feature maps that are also kept, and their concatenation.

On the CPU the compiled module pools without indices, and its backward pass adds both gradients of the feature maps in
the same pass. Everywhere else, and where a pooling has to be seen (`watched`), PyTorch's operators do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, _native_pooling
from ._watched import watched
from .recomputation import remember


def pool_and_skip(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W) -> its 2 x 2 max pooling (B, C, H // 2, W // 2) and x itself, for the skip connection."""
    if not watched(x) and _native_pooling.takes(x) and _native.serves_cpu():
        pooled, skip = _PoolAndSkip.apply(x)
        return pooled, remember(skip, lambda x: x, x)
    return torch.nn.functional.max_pool2d(x, 2), x


def concatenate(skip: Tensor | None, y: Tensor) -> Tensor:
    """(B, S, H, W), (B, C, H, W) -> (B, S + C, H, W), not kept for backward under `recompute`; y without a skip."""
    if skip is None:
        return y
    return remember(torch.cat([skip, y], 1), lambda *parts: torch.cat(parts, 1), skip, y)


class _PoolAndSkip(torch.autograd.Function):
    """x -> its pooling and x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return _native_pooling.max_pool(x), x.detach()  # x itself would become a view, for one image of other strides

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor | None, grad_skip: Tensor | None) -> Tensor | None:
        if grad_pooled is None:
            return grad_skip
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph: PyTorch's operators have second derivatives
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(torch.nn.functional.max_pool2d(x, 2), x, grad_pooled, create_graph=True)
            return grad if grad_skip is None else grad + grad_skip
        return _native_pooling.max_pool_backward(
            x, grad_pooled, torch.zeros_like(x) if grad_skip is None else grad_skip
        )
