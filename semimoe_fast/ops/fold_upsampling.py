"""The folding of upsampling weights as custom ops on a list of weights, forward and backward.

The map is linear, so its gradient is its adjoint, and the gradient of the adjoint is the map. Triton kernels compute in
float32; plain PyTorch serves float64 and the portable backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .reference import at_least_float32


def fold_upsampling(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """See `functional.fold_upsampling`."""
    return fold(weights, dtype, fused=True)


def fold(weights: Sequence[Tensor], dtype: torch.dtype | None, fused: bool) -> list[Tensor]:
    """See `functional.fold_upsampling`. fused: with the Triton kernels, unless a dtype is float64."""
    dtype = dtype or weights[0].dtype
    return _fold(weights, dtype, fused and torch.float64 not in (weights[0].dtype, dtype))


@torch.library.custom_op("semimoe_fast::fold_upsampling", mutates_args=())
def _fold(weights: Sequence[Tensor], dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """weights (O, C, 3, 3) of one dtype -> kernels (C, O, 4, 4) of another."""
    if not fused:
        return [_folded(weight, dtype) for weight in weights]
    from ..kernels import fold_upsampling

    layout = _layout(weights)
    return fold_upsampling.forward([weight.contiguous(memory_format=layout) for weight in weights], dtype)


@_fold.register_fake
def _(weights: Sequence[Tensor], dtype: torch.dtype, fused: bool) -> list[Tensor]:
    return [_in_layout_of_kernels(w.new_empty(4, 4, w.shape[1], w.shape[0], dtype=dtype), fused) for w in weights]


@torch.library.custom_op("semimoe_fast::fold_upsampling_gradients", mutates_args=())
def _gradients(grad_kernels: Sequence[Tensor], weights: Sequence[Tensor], fused: bool) -> list[Tensor]:
    """grad_kernels (C, O, 4, 4) -> gradients (O, C, 3, 3) in the dtype of the weights, and their layout if they agree
    in it."""
    layout = _layout(weights)
    if not fused:
        return [_adjoint(grad, w.dtype, layout) for grad, w in zip(grad_kernels, weights, strict=True)]
    from ..kernels import fold_upsampling

    grad_kernels = [grad.contiguous(memory_format=torch.channels_last) for grad in grad_kernels]
    return fold_upsampling.backward(grad_kernels, weights[0].dtype, layout)


@_gradients.register_fake
def _(grad_kernels: Sequence[Tensor], weights: Sequence[Tensor], fused: bool) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=_layout(weights)) for weight in weights]


def _layout(weights: Sequence[Tensor]) -> torch.memory_format:
    last = torch.channels_last
    return last if all(weight.is_contiguous(memory_format=last) for weight in weights) else torch.contiguous_format


def _in_layout_of_kernels(kernel: Tensor, fused: bool) -> Tensor:
    """A contiguous kernel (4, 4, C, O) as (C, O, 4, 4) in the memory layout that convolutions take without a copy.

    For cuDNN, and from the Triton kernels, that is channels-last. With oneDNN the order y, x, C, O is the fastest.
    """
    kernel = kernel.permute(2, 3, 0, 1)
    on_cpu = kernel.device.type == "cpu" and not fused
    return kernel if on_cpu else kernel.contiguous(memory_format=torch.channels_last)


def _folded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel of one weight: sums of 2 x 2 neighbors among the taps in reverse order, with zeros around them."""
    outputs, channels = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).flatten(1).T.contiguous()  # PyTorch transposes matrices faster than other tensors
    taps = at_least_float32(taps.view(3, 3, channels * outputs).flip(0, 1))
    kernel = _sums_of_neighbors(taps, padding=1)
    return _in_layout_of_kernels(kernel.view(4, 4, channels, outputs).to(dtype), fused=False)


def _adjoint(grad_kernel: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """The gradient of one weight: sums of 2 x 2 neighbors, in reverse order."""
    channels, outputs = grad_kernel.shape[:2]
    gradient = grad_kernel.permute(2, 3, 0, 1).reshape(4, 4, channels * outputs)
    taps = _sums_of_neighbors(at_least_float32(gradient), padding=0).flip(0, 1).to(dtype)
    taps = taps.view(9 * channels, outputs).T.contiguous().view(outputs, 3, 3, channels)
    return taps.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def _sums_of_neighbors(x: Tensor, padding: int) -> Tensor:
    """Sums of 2 x 2 neighbors of contiguous x (H, W, pairs), which is a channels-last image of one pair per channel."""
    image = x[None].permute(0, 3, 1, 2)  # the stride of the batch tells PyTorch that channels are last
    sums = avg_pool2d(image, 2, stride=1, padding=padding, divisor_override=1)
    return sums.permute(0, 2, 3, 1)[0].contiguous()


def _save_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    weights, _, ctx.fused = inputs
    ctx.save_for_backward(*weights)


def _backward(ctx: Any, grad_kernels: list[Tensor]) -> tuple[list[Tensor], None, None]:
    return _gradients(grad_kernels, ctx.saved_tensors, ctx.fused), None, None


def _save_for_second_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    grad_kernels, _, ctx.fused = inputs
    ctx.dtype = grad_kernels[0].dtype


def _second_backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], list[None], None]:
    return _fold(grads, ctx.dtype, ctx.fused), [None] * len(grads), None


_fold.register_autograd(_backward, setup_context=_save_for_backward)
_gradients.register_autograd(_second_backward, setup_context=_save_for_second_backward)
