"""The loss of one training step (arXiv 2509.13834): a supervised part, and an unsupervised part from pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from . import functional as F
from .model import AdaptiveMultiObjectiveLoss, Projected, SemiMoE

ExpertOutput = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # means, projections, own predictions of SemiMoE.run_experts


class StepLosses(NamedTuple):
    """Losses of a step. Only `total` has a gradient; the other values are for logs. Terms (3,): mask, sdf, boundary."""

    total: Tensor
    supervised_total: Tensor
    unsupervised_total: Tensor  # already weighted by u
    supervised_terms: Tensor
    unsupervised_terms: Tensor
    gate_weights: Tensor  # (T, E), mean over the labeled batch


class Objective(nn.Module):
    """The function `objective` of a model and its adaptive loss as one module."""

    def __init__(self, model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss) -> None:
        super().__init__()
        self.model, self.adaptive = model, adaptive

    def forward(
        self,
        labeled: Tensor,
        targets: Sequence[Tensor],
        unlabeled: Tensor | None,
        unsupervised_weight: float | Tensor,
    ) -> StepLosses:
        return objective(self.model, self.adaptive, labeled, targets, unlabeled, unsupervised_weight)


def objective(
    model: SemiMoE,
    adaptive: AdaptiveMultiObjectiveLoss,
    labeled: Tensor,
    targets: Sequence[Tensor],
    unlabeled: Tensor | None,
    unsupervised_weight: float | Tensor,
) -> StepLosses:
    """Losses of one step.

    labeled, unlabeled: normalized images (B, 3, H, W); targets: mask, sdf and boundary, each (B, H, W) or (B, 1, H, W),
    as `functional.objective_terms` takes them; unsupervised_weight: u. Without unlabeled images (None) the loss is the
    supervised part. BN sees the unlabeled batch first, then the labeled batch, each with its own statistics. Batches of
    one size and shape go through the experts together, which takes fewer and larger operations.
    """
    labeled_output, unlabeled_output = _run_experts(model, labeled, unlabeled)
    weighted, pseudo_terms = _unsupervised(model, adaptive, unlabeled_output, unsupervised_weight)
    means, projections, own = labeled_output
    *gated, gate_weights = model.gating(Projected(means, projections))
    with record_function("losses"):
        terms = F.joint_objective_terms([own, gated], *targets)
        supervised = adaptive(terms)
    return StepLosses(
        total=supervised + weighted,
        supervised_total=supervised.detach(),
        unsupervised_total=weighted.detach(),
        supervised_terms=terms.detach(),
        unsupervised_terms=pseudo_terms.detach(),
        gate_weights=gate_weights.detach().mean(0),
    )


def _run_experts(model: SemiMoE, labeled: Tensor, unlabeled: Tensor | None) -> tuple[ExpertOutput, ExpertOutput | None]:
    """Outputs of the experts for the labeled and the unlabeled batch."""
    if unlabeled is None:
        return model.run_experts(labeled), None
    if labeled.shape != unlabeled.shape:
        unlabeled_output = model.run_experts(unlabeled)
        return model.run_experts(labeled), unlabeled_output
    means, projections, own = model.run_experts(torch.cat([unlabeled, labeled]), groups=2)
    both = zip(means.chunk(2), projections.chunk(2), zip(*(x.chunk(2) for x in own), strict=True), strict=True)
    unlabeled_output, labeled_output = both
    return labeled_output, unlabeled_output


def _unsupervised(
    model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss, output: ExpertOutput | None, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The adaptive loss of the experts' own predictions and the pseudo-labels, times u, and its terms."""
    if output is None:
        return torch.zeros_like(adaptive.log_vars[0]), torch.zeros_like(adaptive.log_vars)
    means, projections, own = output
    labels = model.gating.pseudo_labels(means, projections)
    with record_function("losses"):
        terms = F.objective_terms(*own, *labels)
        return adaptive(terms) * weight, terms
