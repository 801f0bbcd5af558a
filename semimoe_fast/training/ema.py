"""Exponential moving average (EMA) of the weights of a model, for evaluation."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """EMA of the weights and BN statistics of a model, with bias correction as in Adam (arXiv 1412.6980).

    The sums start at 0, and `after` divides them by 1 - decay**steps, so the initial weights do not count.

    sums: name -> EMA without bias correction, for each floating-point tensor of the model's state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.source, self.decay = model.state_dict(), decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.sums = {name: torch.zeros_like(v) for name, v in self.source.items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the sums, in place and without waiting for the device."""
        torch._foreach_lerp_(list(self.sums.values()), [self.source[name] for name in self.sums], 1 - self.decay)

    @torch.no_grad()
    def after(self, steps: int) -> nn.Module:
        """The averaged model in eval mode after `steps` updates; with 0 steps, a copy of the current model."""
        weights = 1 - self.decay**steps
        for name, value in self.model.state_dict().items():
            summed = name in self.sums and steps > 0
            value.copy_(self.sums[name] / weights if summed else self.source[name])
        return self.model
