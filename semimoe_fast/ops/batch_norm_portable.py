"""Batch normalization and ReLU with split statistics in plain PyTorch, and the update of running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import dense
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
    """See `functional.batch_norm_relu`. PyTorch's batch normalization of each group."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # PyTorch sums gradients of bfloat16 and float16 in these dtypes unless x is dense
    x, weight, bias = dense(x), weight.to(dtype), bias.to(dtype)
    if not training:
        statistics = running_mean.to(dtype), running_var.to(dtype)
        y = torch.nn.functional.batch_norm(x, *statistics, weight, bias, eps=eps).relu_()
        return concatenate(skip, y)
    outputs, means, inverse_deviations = zip(
        *(torch.native_batch_norm(run, weight, bias, None, None, True, 0.0, eps) for run in x.chunk(groups)),
        strict=True,
    )
    if running_mean is not None:
        mean, inverse_deviation = torch.stack(means), torch.stack(inverse_deviations)
        values = x.numel() // x.shape[1] // groups
        update_running(running_mean, running_var, mean, inverse_deviation, momentum, eps, values)
    y = (outputs[0] if groups == 1 else torch.cat(outputs)).relu_()
    return concatenate(skip, y)


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    momentum: float,
    eps: float,
    values: int,
) -> None:
    """Update running statistics (C,) in place by each group in turn, as calls of nn.BatchNorm2d would.

    mean, inverse_deviation: 1 / sqrt(variance + eps), (groups, C); values: number of values of a channel in a group.
    """
    variance = (inverse_deviation.pow(-2) - eps).clamp_(min=0) * (values / (values - 1))
    for group_mean, group_variance in zip(mean.to(running_mean.dtype), variance.to(running_var.dtype), strict=True):
        running_mean.lerp_(group_mean, momentum)
        running_var.lerp_(group_variance, momentum)
