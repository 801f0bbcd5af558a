"""2 x 2 max pooling on the CPU, by the compiled module.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._native_batch_norm import ELEMENTS, LANES, joined_step


def takes(x: Tensor) -> bool:
    """Whether the module pools x: (B, C, H, W), channels-last, C a multiple of 16, H and W even, not empty."""
    return (
        x.is_cpu
        and x.dtype in ELEMENTS
        and x.ndim == 4
        and x.numel() > 0
        and x.shape[1] % LANES == 0
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def max_pool(x: Tensor) -> Tensor:
    """x, which the module `takes` -> (B, C, H / 2, W / 2)."""
    batch, channels, height, width = x.shape
    pooled = x.new_empty(batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)
    _native.on_cpu("max_pool", x.shape, ELEMENTS.index(x.dtype), x.data_ptr(), pooled.data_ptr())
    return pooled


def max_pool_backward(x: Tensor, grad_pooled: Tensor, grad_x: Tensor) -> Tensor:
    """grad_x, as x or channels of a channels-last concatenation, plus the gradient of x by that of `max_pool(x)`."""
    x = x.contiguous(memory_format=torch.channels_last)  # hooks on saved tensors may change its strides
    step = joined_step(grad_x, x)
    if step is None:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
        step = x.shape[1]
    grad_pooled = grad_pooled.contiguous(memory_format=torch.channels_last)
    total = torch.empty_like(x)
    addresses = x.data_ptr(), grad_pooled.data_ptr(), grad_x.data_ptr(), step, total.data_ptr()
    _native.on_cpu("max_pool_backward", x.shape, ELEMENTS.index(x.dtype), *addresses)
    return total
