"""The one evaluation of every method: pixels and objects of the validation images at the size of the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data import augment
from semimoe_fast.data.folders import Dataset
from semimoe_fast.device import Precision, autocast
from semimoe_fast.evaluation import metrics, score_images
from semimoe_fast.evaluation.metrics import Scores
from semimoe_fast.inference.image import eightfold
from semimoe_fast.inference.predictor import not_background

from .method import Method

OF_OBJECTS = ("object_f1", "object_dice", "object_hausdorff")
BATCH = 8


class Scored(NamedTuple):
    """Predictions for N images and their scores over all pixels, at threshold 0.5 and swept."""

    pixels: Scores
    probability: Tensor  # of foreground, float32 (N, S, S), on the CPU


@torch.no_grad()
def score(
    method: Method,
    val: Dataset,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision,
    tta: bool = False,
) -> Scored:
    """Predict and score S x S images with masks. The method is in eval mode afterwards.

    tta: predict the mean over the eight flips and rotations.
    """
    method.eval()

    def foreground(images: Tensor) -> Tensor:
        with autocast(precision, device):
            logits = method(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
        return not_background(logits)[:, None].cpu()

    predict = eightfold(foreground) if tta else foreground
    probability = torch.cat([predict(images)[:, 0] for images in val.images.split(BATCH)])
    return Scored(metrics.score(metrics.count(probability, val.masks).sum(0)), probability)


def record(scored: Scored, val: Dataset) -> dict[str, Any]:
    """JSON values: scores at threshold 0.5 and at the swept threshold, of the set and of each image.

    Objects are the 8-connected components of a prediction, and the instances of val's masks. Distances are in pixels
    of the S x S images; images without a distance are None, and left out of the mean.
    """
    pixels = scored.pixels
    half = {"threshold": 0.5, "dice": pixels.dice, "jaccard": pixels.jaccard}
    swept = {"threshold": pixels.swept_threshold, "dice": pixels.swept_dice, "jaccard": pixels.swept_jaccard}
    return {"at_half": half | _objects(scored, val, 0.5), "swept": swept | _objects(scored, val, swept["threshold"])}


def _objects(scored: Scored, val: Dataset, threshold: float) -> dict[str, Any]:
    images = score_images(scored.probability > threshold, val.masks)
    means = {name: _defined(getattr(images, name).nanmean().item()) for name in OF_OBJECTS}
    each = {name: [*map(_defined, getattr(images, name).tolist())] for name in ("dice", *OF_OBJECTS)}
    return means | {"images": each}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
