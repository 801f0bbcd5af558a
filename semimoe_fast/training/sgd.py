"""PyTorch's fused SGD, without its copies of channels-last gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import sgd


class FusedSGD(torch.optim.SGD):
    """torch.optim.SGD(fused=True) for one group of parameters, which sees channels-last tensors as contiguous ones.

    PyTorch 2.13 copies channels-last gradients on a CPU, which takes more than half of the step, and it updates
    channels-last parameters wrongly if their gradients are contiguous. There is no support for a GradScaler. Raises
    ValueError for parameters that are neither contiguous nor channels-last.
    """

    def __init__(self, parameters: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False
        for p in parameters:
            if not p.is_contiguous() and not (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)):
                raise ValueError(
                    f"a parameter {tuple(p.shape)} has strides {p.stride()}: give contiguous or channels-last ones"
                )

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        buffers = [self._momentum(p) if group["momentum"] else None for p in parameters]
        sgd.sgd(
            [_in_order_of(p, p) for p in parameters],
            [_in_order_of(p, p.grad).contiguous() for p in parameters],
            [b if b is None else _in_order_of(p, b) for p, b in zip(parameters, buffers, strict=True)],
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0,
            nesterov=False,
            maximize=False,
        )

    def _momentum(self, parameter: Tensor) -> Tensor:
        """With the strides of the parameter; a loaded state may have others.

        At first 0: the sum of the momentum and the gradient is then the gradient, with which PyTorch starts.
        """
        state = self.state[parameter]
        momentum = state.get("momentum_buffer")
        if momentum is None or momentum.stride() != parameter.stride():
            state["momentum_buffer"] = torch.zeros_like(parameter)
            if momentum is not None:
                state["momentum_buffer"].copy_(momentum)
        return state["momentum_buffer"]


def _in_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A view of a tensor whose elements come in the order in which those of the parameter lie in memory."""
    return tensor if parameter.is_contiguous() else tensor.permute(0, 2, 3, 1)
