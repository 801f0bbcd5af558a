"""The published Semi-MoE recipe and its ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, MultiGating, Projected, SemiMoE
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.optimizers import network_optimizer

from .method import Batch, Method

TASKS = ("mask", "sdf", "boundary")
LOSSES = {"mask": F.squared_dice_loss, "sdf": F.tanh_mse_loss, "boundary": F.soft_dice_loss}
RECIPE = TrainConfig()


class PublishedSemiMoE(Method):
    """Vu et al., BMVC 2025 (arXiv 2509.13834): the step of `semimoe_fast.objective`, written for any subset of tasks.

    loss = adaptive(own + gated against the masks' targets) + u adaptive(own against the gated pseudo-labels), u growing
    linearly to 0.5, where each has a term for every task: squared Dice of the mask, mean squared error of the signed
    distance, soft Dice of the boundary.

    tasks: a task left out loses its expert, its gated prediction and its terms. equal_gates: every gate gives each
    expert the same weight. fixed_weights: the terms have the fixed coefficients 1, 0.5 and 1 as weights, unlearned.
    """

    def __init__(
        self, width: int, tasks: Sequence[str] = TASKS, equal_gates: bool = False, fixed_weights: bool = False
    ) -> None:
        super().__init__()
        self.model = SemiMoE(width=width, expert_tasks=tasks)
        if equal_gates:
            self.model.gating = EqualGating(width, len(tasks), [head.out_channels for head in self.model.gating.heads])
        coefficients = [RECIPE.coefficients[TASKS.index(task)] for task in tasks]
        initial = 0.0 if fixed_weights else RECIPE.initial_log_var
        self.adaptive = AdaptiveMultiObjectiveLoss(coefficients, RECIPE.regularizer, initial)
        self.adaptive.requires_grad_(not fixed_weights)

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        networks = network_optimizer(config, self.model.parameters(), config.lr)
        if not self.adaptive.log_vars.requires_grad:
            return [networks]
        return [
            networks,
            torch.optim.Adam([self.adaptive.log_vars], config.log_var_lr, weight_decay=config.weight_decay),
        ]

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).mask

    def watched(self, images: Tensor) -> dict[str, Any]:
        """The learned loss weights exp(-s), the mean gate weights, and the share of dead channels of each expert."""
        means, *_ = self.model.run_experts(images)  # of features of at least 0
        return {
            "loss_weights": self.adaptive.log_vars.neg().exp().tolist(),
            "gate_weights": self.model.gating.gate_weights(means).mean(0).tolist(),
            "dead_channels": (means == 0).all(0).float().mean(-1).tolist(),
        }

    def loss(self, batch: Batch, progress: float) -> Tensor:
        means, projections, own = self.model.run_experts(torch.cat([batch.unlabeled, batch.labeled]), groups=2)
        (unlabeled, labeled), (u_projections, l_projections) = means.chunk(2), projections.chunk(2)
        own_unlabeled, own_labeled = zip(*(prediction.chunk(2) for prediction in own), strict=True)
        with torch.no_grad():
            *gated, _ = self.model.gating(Projected(unlabeled, u_projections))
        unsupervised = self.adaptive(self.terms(own_unlabeled, self.pseudo_labels(gated)))
        *gated, _ = self.model.gating(Projected(labeled, l_projections))
        targets = self.targets(batch.masks)
        supervised = self.adaptive(self.terms(own_labeled, targets) + self.terms(gated, targets))
        return supervised + RECIPE.unsupervised_weight * progress * unsupervised

    def terms(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss of each task, (T,)."""
        tasks = zip(self.model.tasks, predictions, targets, strict=True)
        return torch.stack([LOSSES[task](prediction, target) for task, prediction, target in tasks])

    def targets(self, masks: Tensor) -> list[Tensor]:
        """The targets of each task, of masks (B, S, S)."""
        sdf, boundary = F.distance_targets(masks, RECIPE.ring_radius)
        targets = {"mask": masks, "sdf": sdf, "boundary": boundary}
        return [targets[task] for task in self.model.tasks]

    def pseudo_labels(self, gated: Sequence[Tensor]) -> list[Tensor]:
        """The labels of each task from the gated predictions."""
        tasks = zip(self.model.tasks, gated, strict=True)
        return [prediction.tanh() if task == "sdf" else prediction.argmax(1) for task, prediction in tasks]


class EqualGating(MultiGating):
    """Gates that weigh all experts equally, whatever the features; their parameters are not trained."""

    def __init__(self, channels: int, experts: int, head_channels: Sequence[int]) -> None:
        super().__init__(channels, experts, head_channels)
        self.gates.requires_grad_(False)

    def gate_weights(self, means: Tensor) -> Tensor:
        batch, experts, _ = means.shape
        return torch.full((batch, len(self.gates), experts), 1 / experts, device=means.device)
