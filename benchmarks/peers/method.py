"""What the methods have in common: a network to train, a loss of a step, and what happens after the step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semimoe_fast.model import ExpertUNet
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.optimizers import network_optimizer


class Batch(NamedTuple):
    """The augmented and normalized images of a step, each (B, 3, S, S)."""

    labeled: Tensor
    masks: Tensor  # of the labeled images: uint8 0/1 (B, S, S)
    unlabeled: Tensor | None  # None for supervised methods
    strong: tuple[Tensor, ...] = ()  # the unlabeled images with as many strong changes as `strong_views` says


class Method(nn.Module):
    """A method: `loss` of a batch, `forward` for predictions. All its random numbers come from torch's generator."""

    learns_from = "labeled and unlabeled"  # or "labeled", or "labels of all"
    strong_views = 0
    predicts_by_average = False  # a method with its own average of weights; --recipe strong then adds none

    def forward(self, images: Tensor) -> Tensor:
        """Mask logits (B, 2, S, S) of the network that predicts, for images (B, 3, S, S)."""
        raise NotImplementedError

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """The loss of a step. progress: share of the epochs done after the current one, in (0, 1]."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the optimizers have updated the weights for the `step`-th time, from 1."""

    def watched(self, images: Tensor) -> dict[str, Any]:
        """JSON values of a point of the learning curve besides scores: of its own weights, on images, in eval mode."""
        return {}

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """The first one follows the schedule of the learning rate."""
        return [network_optimizer(config, self.parameters(), config.lr)]


def unet(width: int) -> ExpertUNet:
    """The U-Net of all methods (Ronneberger et al., arXiv 1505.04597): that of an expert of Semi-MoE, for the mask."""
    return ExpertUNet(out_channels=2, width=width)


def both(network: ExpertUNet, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mask logits of the unlabeled and the labeled images; BN sees them apart, as in the published recipe."""
    _, logits = network(torch.cat([batch.unlabeled, batch.labeled]), groups=2)
    return logits.chunk(2)
