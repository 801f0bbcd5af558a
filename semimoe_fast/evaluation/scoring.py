"""Score all predictors of a model on a labeled set, and format the scores as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import functional as F
from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import Dataset
from ..device import Precision, autocast
from ..inference.predictor import foreground
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
    progress: bool = False,
) -> dict[str, Tensor]:
    """Counts of every predictor on a labeled set of N images, int64 (N, 45, 3) on the CPU, by predictor name.

    batch: images per batch. The model is in eval mode afterwards.
    """
    model.eval()
    counts: dict[str, list[Tensor]] = {}
    batches = list(zip(dataset.images.split(batch), dataset.masks.split(batch), strict=True))
    for images, masks in tqdm(batches, "evaluate", disable=not progress):
        masks = masks.to(device)
        _, ring = F.distance_targets(masks, preprocessing.ring_radius, instances=preprocessing.instances)
        with autocast(precision, device):
            output = model(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
        for name, probability in foreground(output, model.expert_tasks).items():
            truth = ring if name.startswith("boundary") else masks
            counts.setdefault(name, []).append(metrics.count(probability, truth))
    return {name: torch.cat(parts).cpu() for name, parts in counts.items()}


def score_set(counts: dict[str, Tensor]) -> dict[str, metrics.Scores]:
    """Scores over all pixels of the set, by predictor name."""
    return {name: metrics.score(images.sum(0)) for name, images in counts.items()}


def table(counts: dict[str, Tensor], names: Sequence[str]) -> str:
    """A text table with the scores of each predictor, per image and over all pixels."""
    header = f"{'':<36}{'Dice':>8}{'Jaccard':>9}   {'swept: Dice':>12}{'Jaccard':>9}{'threshold':>11}"
    rows = [header]
    for predictor, images in counts.items():
        rows += [_row(f"{predictor}, {name}", metrics.score(image)) for name, image in zip(names, images, strict=True)]
    rows.append("-" * len(header))
    rows += [_row(f"{predictor}, all", scores) for predictor, scores in score_set(counts).items()]
    return "\n".join(rows)


def _row(name: str, s: metrics.Scores) -> str:
    swept = f"{s.swept_dice:12.4f}{s.swept_jaccard:9.4f}{s.swept_threshold:11.2f}"
    return f"{name[:35]:<36}{s.dice:8.4f}{s.jaccard:9.4f}   {swept}"


def as_json(counts: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """The scores over all pixels ("all") and per image ("images"), by predictor name, as JSON values."""
    per_image = {
        name: {predictor: metrics.score(images[i])._asdict() for predictor, images in counts.items()}
        for i, name in enumerate(names)
    }
    return {"all": {name: s._asdict() for name, s in score_set(counts).items()}, "images": per_image}
