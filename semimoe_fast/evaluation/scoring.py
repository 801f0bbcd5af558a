"""Pixel scores of all predictors of a model on a labeled set, as training validates: squares, or images as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import functional as F
from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import Dataset
from ..data.ragged import Ragged
from ..data.readers import ArrayReader
from ..device import Precision, autocast
from ..inference.predictor import foreground, is_boundary
from ..model import STRIDE, SemiMoE
from . import metrics
from .whole import predict_whole


@torch.no_grad()
def count_set(
    model: SemiMoE,
    dataset: Dataset | Ragged,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
    batch: int = 8,
) -> dict[str, Tensor]:
    """Counts of every predictor on a labeled set of N images, int64 (N, 45, 3) on the CPU, by predictor name.

    batch: images per batch, if they have one size; otherwise they are predicted one by one by `predict_whole`. The
    model is in eval mode afterwards. Raises FloatingPointError for NaN in predictions.
    """
    model.eval()
    predict = _squares if isinstance(dataset, Dataset) else _whole
    counts: dict[str, list[Tensor]] = {}
    for probabilities, masks in predict(model, dataset, preprocessing, device, precision, batch):
        _, ring = F.distance_targets(masks, preprocessing.ring_radius, instances=preprocessing.instances)
        for name, probability in probabilities.items():
            if not probability.isfinite().all():
                raise FloatingPointError(f"the prediction {name!r} has values that are not finite")
            truth = ring if is_boundary(name) else masks
            counts.setdefault(name, []).append(metrics.count(probability, truth))
    return {name: torch.cat(parts).cpu() for name, parts in counts.items()}


Predictions = Iterator[tuple[dict[str, Tensor], Tensor]]  # probabilities (B, H, W) by predictor, and masks (B, H, W)


def _squares(
    model: SemiMoE,
    dataset: Dataset,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision,
    batch: int,
) -> Predictions:
    for images, masks in zip(dataset.images.split(batch), dataset.masks.split(batch), strict=True):
        with autocast(precision, device):
            output = model(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
        yield foreground(output, model.expert_tasks), masks.to(device)


def _whole(
    model: SemiMoE, dataset: Ragged, preprocessing: Preprocessing, device: torch.device, precision: Precision, _: int
) -> Predictions:
    if not len(dataset):  # a process without images still takes part in the sums of all predictors
        yield from _squares(model, dataset.centers(STRIDE), preprocessing, device, precision, 1)
    for index in range(len(dataset)):
        image = ArrayReader(dataset.image(index).numpy())
        probabilities = predict_whole(model, image, preprocessing, device, precision)
        yield (
            {name: field[None].to(device) for name, field in probabilities.items()},
            dataset.mask(index)[None].to(device),
        )


def score_set(counts: dict[str, Tensor]) -> dict[str, metrics.Scores]:
    """Scores over all pixels of the set, by predictor name."""
    return {name: metrics.score(images.sum(0)) for name, images in counts.items()}
