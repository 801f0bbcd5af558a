"""Pixel scores of all predictors of a model on a labeled set, at the training size, as training validates."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import Dataset
from ..device import Precision, autocast
from ..inference.predictor import foreground, is_boundary
from ..model import SemiMoE
from . import metrics


@torch.no_grad()
def count_set(
    model: SemiMoE,
    dataset: Dataset,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
    batch: int = 8,
) -> dict[str, Tensor]:
    """Counts of every predictor on a labeled set of N images, int64 (N, 45, 3) on the CPU, by predictor name.

    batch: images per batch. The model is in eval mode afterwards. Raises FloatingPointError for NaN in predictions.
    """
    model.eval()
    counts: dict[str, list[Tensor]] = {}
    for images, masks in zip(dataset.images.split(batch), dataset.masks.split(batch), strict=True):
        masks = masks.to(device)
        _, ring = F.distance_targets(masks, preprocessing.ring_radius, instances=preprocessing.instances)
        with autocast(precision, device):
            output = model(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
        for name, probability in foreground(output, model.expert_tasks).items():
            if not probability.isfinite().all():
                raise FloatingPointError(f"the prediction {name!r} has values that are not finite")
            truth = ring if is_boundary(name) else masks
            counts.setdefault(name, []).append(metrics.count(probability, truth))
    return {name: torch.cat(parts).cpu() for name, parts in counts.items()}


def score_set(counts: dict[str, Tensor]) -> dict[str, metrics.Scores]:
    """Scores over all pixels of the set, by predictor name."""
    return {name: metrics.score(images.sum(0)) for name, images in counts.items()}
