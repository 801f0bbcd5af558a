"""Dice and Jaccard over all pixels of a set, at threshold 0.5 and at the best of a sweep, as in the published code.

`count` and `score` are separate functions, so that counts of batches are summed on the device and read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(45))  # 0, 0.02, ..., 0.88
HALF = THRESHOLDS.index(0.5)


class Scores(NamedTuple):
    """Fractions in [0, 1]. The swept threshold is chosen on the scored set, so the swept scores are optimistic."""

    dice: float
    jaccard: float
    swept_dice: float
    swept_jaccard: float
    swept_threshold: float


def count(probability: Tensor, mask: Tensor) -> Tensor:
    """Count true positives, predicted foreground pixels and true foreground pixels per image and threshold.

    probability: (B, H, W) in [0, 1]; mask: (B, H, W), non-zero is foreground -> int64 (B, 45, 3). The prediction is
    foreground if the probability is greater than the threshold, so never where it is NaN.
    """
    return count_levels(levels(probability), mask)


def levels(probability: Tensor) -> Tensor:
    """The number of thresholds below each probability, int64: the prediction at THRESHOLDS[k] is levels > k.

    NaN is above no threshold.
    """
    thresholds = torch.tensor(THRESHOLDS, dtype=probability.dtype, device=probability.device)
    return torch.searchsorted(thresholds, probability.nan_to_num(nan=0.0).contiguous())


def count_levels(levels: Tensor, mask: Tensor) -> Tensor:
    """As `count`, from `levels` (B, H, W)."""
    exceeded = levels.flatten(1)
    foreground = (mask != 0).flatten(1)
    bins = len(THRESHOLDS) + 1
    histogram = torch.zeros(len(mask), 2 * bins, dtype=torch.int64, device=mask.device)
    histogram.scatter_add_(1, exceeded + bins * foreground, torch.ones_like(exceeded))
    background_tail, foreground_tail = histogram.unflatten(1, (2, bins)).flip(2).cumsum(2).flip(2)[..., 1:].unbind(1)
    actual = foreground.sum(1, keepdim=True).expand_as(foreground_tail)
    return torch.stack([foreground_tail, background_tail + foreground_tail, actual], 2)


def score(counts: Tensor) -> Scores:
    """Scores of counts (45, 3), usually summed over the images of a set. They are 1 if both masks are empty."""
    dice, jaccard = dice_and_jaccard(counts)
    best = int(jaccard.argmax())
    return Scores(
        dice=dice[HALF].item(),
        jaccard=jaccard[HALF].item(),
        swept_dice=dice[best].item(),
        swept_jaccard=jaccard[best].item(),
        swept_threshold=THRESHOLDS[best],
    )


def dice_and_jaccard(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and Jaccard, float64 (...), of counts (..., 3) as `count` gives them. They are 1 if both masks are empty."""
    true_positive, predicted, actual = counts.double().unbind(-1)
    union = predicted + actual - true_positive
    jaccard = torch.where(union > 0, true_positive / union, 1.0)
    return torch.where(union > 0, 2 * true_positive / (predicted + actual), 1.0), jaccard
