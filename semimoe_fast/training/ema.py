"""An exponential moving average of a model's weights, to evaluate in the place of the last ones (Polyak averaging)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """The mean of what a model was after its steps, of weights and of BN's statistics, older ones weighing less.

    A step weighs `decay` times as much as the one after it. The sums start at 0 and are divided by the weights that
    they hold, as Adam's moments are (arXiv 1412.6980), so that the initial weights have no part in the mean.

    sums: of every floating-point tensor of the model's state, updated in place without waiting for the device.
    """

    def __init__(self, followed: nn.Module, decay: float) -> None:
        self.followed, self.decay = followed.state_dict(), decay
        self.model = copy.deepcopy(followed).requires_grad_(False).eval()
        self.sums = {name: torch.zeros_like(v) for name, v in self.followed.items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model after one more step."""
        torch._foreach_lerp_(list(self.sums.values()), [self.followed[name] for name in self.sums], 1 - self.decay)

    @torch.no_grad()
    def after(self, steps: int) -> nn.Module:
        """The mean over so many steps, as a model in eval mode; before the first, the model as it is."""
        weights = 1 - self.decay**steps
        for name, value in self.model.state_dict().items():
            summed = name in self.sums and steps > 0
            value.copy_(self.sums[name] / weights if summed else self.followed[name])
        return self.model
