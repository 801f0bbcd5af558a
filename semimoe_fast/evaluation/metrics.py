"""Dice and Jaccard over all pixels of a set, at threshold 0.5 and at the best of a sweep, as the published code scores.

Counting and scoring are apart, so that counts add up over batches on the device and are read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(45))  # 0, 0.02, ..., 0.88
HALF = THRESHOLDS.index(0.5)


class Scores(NamedTuple):
    """Fractions in [0, 1]. The swept threshold is chosen on the set it is reported for, so it flatters."""

    dice: float
    jaccard: float
    swept_dice: float
    swept_jaccard: float
    swept_threshold: float


def count(probability: Tensor, mask: Tensor) -> Tensor:
    """Per image and threshold: true positives, predicted and actual foreground pixels.

    probability: (B, H, W) in [0, 1], mask: (B, H, W), non-zero is foreground -> int64 (B, 45, 3). A pixel is predicted
    foreground where its probability exceeds the threshold.
    """
    thresholds = torch.tensor(THRESHOLDS, dtype=probability.dtype, device=probability.device)
    exceeded = torch.searchsorted(thresholds, probability.flatten(1).contiguous())  # how many thresholds lie below
    foreground = (mask != 0).flatten(1)
    bins = len(THRESHOLDS) + 1
    histogram = torch.zeros(len(mask), 2 * bins, dtype=torch.int64, device=mask.device)
    histogram.scatter_add_(1, exceeded + bins * foreground, torch.ones_like(exceeded))
    background_tail, foreground_tail = histogram.unflatten(1, (2, bins)).flip(2).cumsum(2).flip(2)[..., 1:].unbind(1)
    actual = foreground.sum(1, keepdim=True).expand_as(foreground_tail)
    return torch.stack([foreground_tail, background_tail + foreground_tail, actual], 2)


def score(counts: Tensor) -> Scores:
    """Scores of counts (45, 3), usually summed over the images of a set. Empty against empty is a perfect 1."""
    true_positive, predicted, actual = counts.double().unbind(1)
    union = predicted + actual - true_positive
    jaccard = torch.where(union > 0, true_positive / union, 1.0)
    dice = torch.where(union > 0, 2 * true_positive / (predicted + actual), 1.0)
    best = int(jaccard.argmax())
    return Scores(
        dice=dice[HALF].item(),
        jaccard=jaccard[HALF].item(),
        swept_dice=dice[best].item(),
        swept_jaccard=jaccard[best].item(),
        swept_threshold=THRESHOLDS[best],
    )
