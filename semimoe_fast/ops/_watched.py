"""Whether tracing, a transform or a tensor subclass needs an operation as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation sees the operation. Custom ops have no rules for them."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched(*tensors: Tensor) -> bool:
    """Whether something must see the operation.

    That is torch.compile, torch.jit.trace, torch.func, forward-mode differentiation, a dispatch mode such as
    FakeTensorMode, or a tensor subclass.

    If not, the plain functions of an operation are called, because on a CPU a custom op and its autograd take longer
    than the computation of small feature maps: 70 us more, forward and backward.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _len_torch_dispatch_stack() > 0
        or transformed()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )
