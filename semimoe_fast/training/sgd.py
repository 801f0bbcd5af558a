"""PyTorch's fused SGD, without its copies of channels-last gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import sgd


class FusedSGD(torch.optim.SGD):
    """torch.optim.SGD(fused=True) for one group of parameters, which sees channels-last tensors as contiguous ones.

    PyTorch 2.13 copies channels-last gradients on a CPU, which takes more than half of the step, and it updates
    channels-last parameters wrongly if their gradients are contiguous.
    """

    def __init__(self, parameters: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
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
        """At first 0: the sum of the momentum and the gradient is then the gradient, with which PyTorch starts."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _in_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A view of a tensor whose elements come in the order in which those of the parameter lie in memory."""
    return tensor if parameter.is_contiguous() else tensor.permute(0, 2, 3, 1)
