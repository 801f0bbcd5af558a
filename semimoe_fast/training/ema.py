"""Exponential moving average (EMA) of the weights of a model, for evaluation and pseudo-labels."""

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
        self.averaged = self.model.state_dict()
        self.counts = [name for name in self.averaged if name not in self.sums]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the sums, in place and without waiting for the device."""
        torch._foreach_lerp_(list(self.sums.values()), [self.source[name] for name in self.sums], 1 - self.decay)

    @torch.no_grad()
    def after(self, steps: int) -> nn.Module:
        """The averaged model in eval mode after `steps` updates; with 0 steps, a copy of the current model."""
        sources = self.sums if steps else self.source
        averages = [self.averaged[name] for name in self.sums]
        torch._foreach_copy_(averages, [sources[name] for name in self.sums])
        if steps:
            torch._foreach_div_(averages, 1 - self.decay**steps)
        torch._foreach_copy_([self.averaged[n] for n in self.counts], [self.source[n] for n in self.counts])
        return self.model
