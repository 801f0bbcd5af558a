"""The loss of one training step (arXiv 2509.13834): supervised, and from pseudo-labels unsupervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from . import functional as F
from .model import AdaptiveMultiObjectiveLoss, SemiMoE

ExpertOutput = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # what SemiMoE.run_experts gives


class StepLosses(NamedTuple):
    """total carries the gradient; the rest is for the record. Terms are (3,): mask, sdf, boundary."""

    total: Tensor
    supervised_total: Tensor
    unsupervised_total: Tensor  # already weighted by u
    supervised_terms: Tensor
    unsupervised_terms: Tensor
    gate_weights: Tensor  # (T, E), mean over the labeled batch


class Objective(nn.Module):
    """`objective` of a model and its adaptive loss, as one module with one backward pass."""

    def __init__(self, model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss, joint_forward: bool = False) -> None:
        super().__init__()
        self.model, self.adaptive, self.joint_forward = model, adaptive, joint_forward

    def forward(
        self,
        labeled: Tensor,
        targets: Sequence[Tensor],
        unlabeled: Tensor | None,
        unsupervised_weight: float | Tensor,
    ) -> StepLosses:
        return objective(
            self.model, self.adaptive, labeled, targets, unlabeled, unsupervised_weight, self.joint_forward
        )


def objective(
    model: SemiMoE,
    adaptive: AdaptiveMultiObjectiveLoss,
    labeled: Tensor,
    targets: Sequence[Tensor],
    unlabeled: Tensor | None,
    unsupervised_weight: float | Tensor,
    joint_forward: bool = False,
) -> StepLosses:
    """Losses of one step.

    labeled, unlabeled: normalized images (B, 3, H, W); targets: mask (B, H, W), sdf (B, H, W) or (B, 1, H, W),
    boundary (B, H, W); unsupervised_weight: u. Without unlabeled images the loss is the supervised part alone.
    BN sees the unlabeled batch first, and both batches apart; with joint_forward both as one, and once.
    """
    learned, guessed = _run_experts(model, labeled, unlabeled, joint_forward)
    weighted, pseudo_terms = _unsupervised(model, adaptive, guessed, unsupervised_weight)
    means, projections, own = learned
    *gated, gate_weights = model.gating.mix(means, projections)
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


def _run_experts(
    model: SemiMoE, labeled: Tensor, unlabeled: Tensor | None, joint: bool
) -> tuple[ExpertOutput, ExpertOutput | None]:
    """The experts' means, projections and own predictions of either batch."""
    if unlabeled is None:
        return model.run_experts(labeled), None
    if not joint:
        guessed = model.run_experts(unlabeled)
        return model.run_experts(labeled), guessed
    count = len(unlabeled)
    means, projections, own = model.run_experts(torch.cat([unlabeled, labeled]))
    return (
        (means[count:], projections[count:], tuple(prediction[count:] for prediction in own)),
        (means[:count], projections[:count], tuple(prediction[:count] for prediction in own)),
    )


def _unsupervised(
    model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss, output: ExpertOutput | None, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """u times the adaptive loss of every expert against its pseudo-label, and its terms."""
    if output is None:
        return torch.zeros_like(adaptive.log_vars[0]), torch.zeros_like(adaptive.log_vars)
    means, projections, own = output
    labels = model.gating.pseudo_labels(means, projections)
    with record_function("losses"):
        terms = F.objective_terms(*own, *labels)
        return adaptive(terms) * weight, terms
