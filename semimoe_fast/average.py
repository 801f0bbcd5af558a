"""An exponential moving average of a model's weights, to evaluate in the place of the last ones (Polyak averaging)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """A copy of a model that follows it: average <- decay * average + (1 - decay) * model, BN statistics included.

    model: the average; it takes no gradient. Integer buffers are copied. `update` neither allocates nor waits for the
    device.
    """

    def __init__(self, followed: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(followed).requires_grad_(False).eval()
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), followed.state_dict().values(), strict=True))
        self.averaged = tuple(zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        self.counted = tuple(zip(*(pair for pair in pairs if not pair[0].is_floating_point()), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take one step after the model's own."""
        torch._foreach_lerp_(*self.averaged, 1 - self.decay)
        torch._foreach_copy_(*self.counted)
