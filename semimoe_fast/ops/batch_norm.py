"""The fused batch normalization and ReLU as custom ops: training, evaluation with given statistics, gradients.

Triton kernels compute them on a GPU, the compiled module on the CPU, both in float32. The portable backend handles
float64, and gradients in evaluation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native_batch_norm, _triton, batch_norm_portable, recomputation
from ._derivatives import first_alone
from ._layout import dense
from ._watched import watched
from .skips import concatenate


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    training: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """See `functional.batch_norm_relu`."""
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    if x.dtype == torch.float64 or (wants_gradients and not training):
        return batch_norm_portable.batch_norm_relu(
            x, weight, bias, running_mean, running_var, momentum, eps, groups, training, skip
        )
    weight, bias = weight.float(), bias.float()
    as_op = watched(x, weight, bias, *([] if skip is None else [skip]))
    evaluate = _evaluate if as_op else _forward_with
    if not training:
        y = evaluate(x, weight, bias, running_mean.float(), torch.rsqrt(running_var.float() + eps))
        return concatenate(skip, y)
    native = _kernels(x.device.type) is _native_batch_norm
    if skip is not None and not as_op and native and _native_batch_norm.joins(skip, x):
        result, *statistics = _BatchNormReLU.apply(x, weight, bias, eps, groups, skip)
        recomputation.remember(result, _after, skip, x, weight, bias, *statistics)
    else:
        y, *statistics = (_normalize if as_op else _BatchNormReLU.apply)(x, weight, bias, eps, groups)
        recomputation.remember(y, evaluate, x, weight, bias, *statistics)
        result = concatenate(skip, y)
    if running_mean is not None:
        values = x.numel() // x.shape[1] // groups
        _update(as_op, running_mean, running_var, *statistics, momentum, eps, values)
    return result


def _update(
    as_op: bool,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    momentum: float,
    eps: float,
    values: int,
) -> None:
    """Update running statistics as `batch_norm_portable.update_running` does."""
    statistics = running_mean, running_var, mean, inverse_deviation
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in statistics[:2]):
        batch_norm_portable.update_running(*statistics, momentum, eps, values)
        return
    if as_op:
        _update_running(*statistics, momentum, eps, values)
    else:
        _move_running(*statistics, momentum, eps, values)
        torch.autograd.graph.increment_version((running_mean, running_var))  # as the op does


def _kernels(device_type: str) -> ModuleType:
    """The module that computes: on the CPU the compiled module, unless a test asks for Triton's interpreter."""
    if device_type == "cpu" and not _triton.interprets():
        return _native_batch_norm
    from ..kernels import batch_norm

    return batch_norm


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W), weight and bias float32 (C,) -> y as x, mean and 1 / sqrt(variance + eps) float32 (groups, C)."""
    compute = _kernels(x.device.type).batch_norm_relu_fwd
    return compute(dense(x), weight.contiguous(), bias.contiguous(), eps, groups)


_normalize = torch.library.custom_op("semimoe_fast::batch_norm_relu", _forward, mutates_args=())


@_normalize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, inverse_deviation = (weight.new_empty(groups, x.shape[1]) for _ in range(2))
    return torch.empty_like(dense(x)), mean, inverse_deviation


def _move_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    momentum: float,
    eps: float,
    values: int,
) -> None:
    """Update running statistics float32 (C,) as `batch_norm_portable.update_running` does.

    A custom op apart from `_normalize`, because PyTorch differentiates no op that changes its arguments.
    """
    compute = _kernels(running_mean.device.type).update_running
    compute(running_mean, running_var, mean, inverse_deviation, momentum, eps, values)


_update_running = torch.library.custom_op(
    "semimoe_fast::batch_norm_update_running", _move_running, mutates_args=("running_mean", "running_var")
)


@_update_running.register_fake
def _(*_: object) -> None:
    return None


def _forward_with(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """x (B, C, H, W), weight and bias float32 (C,), mean and inverse_deviation float32 (C,) or (groups, C) -> y as x.

    With the statistics of `_normalize` and its other arguments, y has the same bits as there.
    """
    statistics = [tensor.contiguous() for tensor in (weight, bias, mean, inverse_deviation)]
    return _kernels(x.device.type).batch_norm_relu_eval(dense(x), *statistics)


def _after(skip: Tensor, *arguments: Tensor) -> Tensor:
    """The concatenation of `skip` and `_forward_with(*arguments)`."""
    return torch.cat([skip, _forward_with(*arguments)], 1)


_evaluate = torch.library.custom_op("semimoe_fast::batch_norm_relu_eval", _forward_with, mutates_args=())


@_evaluate.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(dense(x))


def _differentiate(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_output as y, arguments of `_normalize` and its statistics -> gradients of x, weight and bias."""
    x = dense(x)
    kernels = _kernels(x.device.type)
    if kernels is not _native_batch_norm or _native_batch_norm.joined_step(grad_output, x) is None:
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad_output = grad_output.contiguous(memory_format=layout)
    weight, bias = weight.contiguous(), bias.contiguous()
    return kernels.batch_norm_relu_bwd(grad_output, x, weight, bias, mean, inverse_deviation, groups)


_gradients = torch.library.custom_op("semimoe_fast::batch_norm_relu_gradients", _differentiate, mutates_args=())


@_gradients.register_fake
def _(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.groups, *_ = inputs
    _, *ctx.statistics = output
    ctx.mark_non_differentiable(*ctx.statistics)  # so they may be kept as they are: no part of a graph refers to them
    ctx.save_for_backward(x, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 5
    as_op = torch.is_grad_enabled() or watched(grad_output)  # the op refuses second derivatives
    compute = _gradients if as_op else _differentiate
    return *compute(grad_output, *ctx.saved_tensors, *ctx.statistics, ctx.groups), None, None


class _BatchNormReLU(torch.autograd.Function):
    """`_forward` with its gradients, without a custom op; see `watched`. With `skip` the concatenation of it and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int, *skip: Tensor) -> tuple:
        inputs = x, weight, bias, eps, groups
        outputs = _native_batch_norm.joined_fwd(*skip, *inputs) if skip else _forward(*inputs)
        ctx.skips = [tensor.shape[1] for tensor in skip]
        _save_for_backward(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None or not ctx.skips:
            return *_backward(ctx, grad_output), *(None for _ in ctx.skips)
        (skips,) = ctx.skips
        return *_backward(ctx, grad_output[:, skips:]), grad_output[:, :skips]


_normalize.register_autograd(_backward, setup_context=_save_for_backward)
_gradients.register_autograd(first_alone("the fused batch normalization", "portable"))
