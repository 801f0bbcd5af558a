"""PyTorch's fused SGD and AdamW, without their copies of channels-last gradients.

PyTorch 2.13 copies channels-last gradients on a CPU, which takes more than half of a step of SGD, and it updates
channels-last parameters wrongly if their gradients are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import adam, sgd

from .config import TrainConfig


def network_optimizer(config: TrainConfig, parameters: Iterable[Tensor], lr: float | Tensor) -> FusedSGD | FusedAdamW:
    """The optimizer of a run for the trained ones of the parameters of its networks."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.optimizer == "adamw":
        return FusedAdamW(trained, lr, config.weight_decay)
    return FusedSGD(trained, lr, config.momentum, config.weight_decay)


class FusedSGD(torch.optim.SGD):
    """torch.optim.SGD(fused=True) for one group of parameters, which sees channels-last tensors as contiguous ones.

    There is no support for a GradScaler. Raises ValueError for parameters that are neither contiguous nor
    channels-last.
    """

    def __init__(self, parameters: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        _require_order(parameters)
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        # at first 0: the sum of the momentum and the gradient is then the gradient, with which PyTorch starts
        momenta = [_moment(self.state, p, "momentum_buffer") if group["momentum"] else None for p in parameters]
        sgd.sgd(
            *_in_order(parameters),
            [m if m is None else _in_order_of(p, m) for p, m in zip(parameters, momenta, strict=True)],
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0,
            nesterov=False,
            maximize=False,
        )


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) for one group of parameters, as `FusedSGD`; arXiv 1711.05101.

    The counts of steps are on the device of the parameters, as a CUDA graph needs them.
    """

    def __init__(self, parameters: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        _require_order(parameters)
        super().__init__(parameters, lr, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        moments = [
            [_in_order_of(p, _moment(self.state, p, name)) for p in parameters] for name in ("exp_avg", "exp_avg_sq")
        ]
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        beta1, beta2 = group["betas"]
        adam.adam(
            *_in_order(parameters),
            *moments,
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=True,
        )


def _require_order(parameters: list[Tensor]) -> None:
    for p in parameters:
        if not p.is_contiguous() and not (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(
                f"a parameter {tuple(p.shape)} has strides {p.stride()}: give contiguous or channels-last ones"
            )


def _moment(state: dict[Tensor, dict[str, Any]], parameter: Tensor, name: str) -> Tensor:
    """A tensor of the state, at first 0, with the strides of the parameter; a loaded state may have others."""
    kept = state[parameter].get(name)
    if kept is None or kept.stride() != parameter.stride():
        state[parameter][name] = torch.zeros_like(parameter)
        if kept is not None:
            state[parameter][name].copy_(kept)
    return state[parameter][name]


def _in_order(parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and their gradients as `_in_order_of`."""
    return [_in_order_of(p, p) for p in parameters], [_in_order_of(p, p.grad).contiguous() for p in parameters]


def _in_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A view of a tensor whose elements come in the order in which those of the parameter lie in memory."""
    return tensor if parameter.is_contiguous() else tensor.permute(0, 2, 3, 1)
