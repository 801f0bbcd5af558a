"""Batch normalization and ReLU on the CPU, by the compiled module. kernels/batch_norm.py is its counterpart on the GPU.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout. Feature
maps are (B, C, H, W) in float32, bfloat16 or float16, contiguous or channels-last; everything else is contiguous
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native

LANES = 16  # the most floats in a vector, kMostLanes in csrc/objective_kernels.hpp
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of Element in csrc/batch_norm_kernels.hpp

# Images, channels, pixels, groups, elements from pixel to pixel of y and its gradient; element type; channels last.
Maps = tuple[tuple[int, int, int, int, int], int, bool]


def batch_norm_relu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, shaped as x, and mean and inverse deviation 1 / sqrt(variance + eps) of each group, (groups, C).

    weight, bias: (C,). y: memory for the result, which `joined_step` accepts; None for new memory. Raises ValueError
    for other tensors and unequal groups.
    """
    y = torch.empty_like(x) if y is None else y
    mean, inverse_deviation = (torch.empty(groups, x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    statistics = _statistics(weight, bias, mean, inverse_deviation, groups)
    maps = _maps(x, groups, y)
    _native.on_cpu("batch_norm_relu_forward", *maps, x.data_ptr(), statistics, eps, y.data_ptr())
    return y, mean, inverse_deviation


def joins(skip: Tensor, x: Tensor) -> bool:
    """Whether `joined_fwd` takes these."""
    channels_last = all(t.is_cpu and t.is_contiguous(memory_format=torch.channels_last) for t in (skip, x))
    return channels_last and skip.dtype == x.dtype and skip.shape[1] % LANES == x.shape[1] % LANES == 0


def joined_fwd(
    skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_norm_relu_fwd`, with the concatenation (B, S + C, H, W) of skip (B, S, H, W) and y instead of y."""
    batch, skips, height, width = skip.shape
    joined = x.new_empty(batch, height, width, skips + x.shape[1]).permute(0, 3, 1, 2)
    _, *statistics = batch_norm_relu_fwd(x, weight, bias, eps, groups, joined[:, skips:])
    joined[:, :skips] = skip
    return joined, *statistics


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    momentum: float,
    eps: float,
    values: int,
) -> None:
    """Move running statistics (C,) in place toward those of each group, (groups, C), in turn.

    values: number of values of a channel in a group, at least 2.
    """
    addresses = _statistics(running_mean, running_var, mean, inverse_deviation, len(mean))
    _native.module_for("cpu").batch_norm_update_running(*mean.shape, values, addresses, momentum, eps)


def batch_norm_relu_eval(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """y, shaped as x. weight, bias: (C,); mean, inverse_deviation: (C,) or (groups, C)."""
    y = torch.empty_like(x)
    mean, inverse_deviation = torch.atleast_2d(mean, inverse_deviation)
    statistics = _statistics(weight, bias, mean, inverse_deviation, groups := len(mean))
    if x.numel() > 0:
        _native.on_cpu("batch_norm_relu_eval", *_maps(x, groups), x.data_ptr(), statistics, y.data_ptr())
    return y


def batch_norm_relu_bwd(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shaped as x, and of weight and bias (C,).

    grad_output: as x, with strides that `joined_step` accepts; the others as `batch_norm_relu_fwd` takes and returns
    them.
    """
    maps = _maps(x, groups, grad_output)
    statistics = _statistics(weight, bias, mean, inverse_deviation, groups)
    gradients = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    addresses = [gradient.data_ptr() for gradient in gradients]
    _native.on_cpu("batch_norm_relu_backward", *maps, x.data_ptr(), grad_output.data_ptr(), statistics, *addresses)
    return gradients


def joined_step(y: Tensor, x: Tensor) -> int | None:
    """Elements from pixel to pixel of y, in the layout of x or channels of a channels-last concatenation.

    None for other tensors. Channels in a concatenation are a multiple of 16, and so are all of it.
    """
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        return None
    _, channels, height, width = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format):
        return channels
    step = y.stride(3)
    joined = y.stride() == (height * width * step, 1, width * step, step) and step > channels
    return step if channels_last and joined and channels % LANES == 0 and step % LANES == 0 else None


def _maps(x: Tensor, groups: int, y: Tensor | None = None) -> Maps:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if x.ndim != 4 or not (channels_last or x.is_contiguous()) or x.dtype not in ELEMENTS or not x.is_cpu:
        raise ValueError(
            f"feature maps are (B, C, H, W) in float32, bfloat16 or float16 on the CPU, contiguous or channels-last, "
            f"got {_describe(x)}"
        )
    batch, channels, height, width = x.shape
    step = channels if y is None else joined_step(y, x)
    if step is None:
        raise ValueError(f"y and its gradient are {x.dtype} {tuple(x.shape)} in the layout of x, got {_describe(y)}")
    return (batch, channels, height * width, groups, step), ELEMENTS.index(x.dtype), channels_last


def _statistics(weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor, groups: int) -> Sequence[int]:
    """The addresses of the tensors."""
    channels = weight.numel()
    shapes = (channels,), (channels,), (groups, channels), (groups, channels)
    tensors = weight, bias, mean, inverse_deviation
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32 or not (tensor.is_cpu and tensor.is_contiguous()):
            raise ValueError(f"expected contiguous torch.float32 {shape} on the CPU, got {_describe(tensor)}")
    return [tensor.data_ptr() for tensor in tensors]


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device.type}"
