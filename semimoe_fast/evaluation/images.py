"""Scores of the images of a set over pixels, objects and surfaces. The images may differ in size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .maps import array_pair
from .metrics import dice_and_jaccard
from .objects import object_scores
from .surfaces import surface_distances


class ImageScores(NamedTuple):
    """Scores of N images, on the CPU; float64 (N,) if nothing else is said."""

    dice: Tensor  # of pixels, in [0, 1]; 1 where both masks are empty
    jaccard: Tensor  # of pixels, in [0, 1]; 1 where both masks are empty
    object_f1: Tensor  # in [0, 1]; 1 where neither map has an object
    object_dice: Tensor  # in [0, 1]; 1 where neither map has an object, 0 where one has none
    object_hausdorff: Tensor  # in pixels; NaN where a map has no object
    hd95: Tensor  # in pixels; NaN where a mask is empty
    assd: Tensor  # in pixels; NaN where a mask is empty
    pixel_counts: Tensor  # int64 (N, 3): true positives, predicted foreground, true foreground
    object_counts: Tensor  # int64 (N, 3): true positives, false positives, false negatives


SCORES = ImageScores._fields[:7]  # the names of those that are one number an image


def score_images(predictions: Iterable[Any], truths: Iterable[Any]) -> ImageScores:
    """Score each prediction against its truth.

    predictions, truths: N instance maps or masks (H, W) of bool or any integer dtype, or arrays (N, H, W); what counts
    as an object is said at `object_scores`. Any iterable will do, for example one that reads files -> ImageScores.

    Raises TypeError for floating-point maps, ValueError for other shapes, such as lists of batches, shapes that
    differ, negative ids, or if there are more predictions than truths or the reverse.
    """
    rows = [_score(prediction, truth) for prediction, truth in zip(predictions, truths, strict=True)]
    if not rows:
        none = torch.zeros(0, dtype=torch.float64)
        return ImageScores(*[none] * len(SCORES), *[torch.zeros(0, 3, dtype=torch.int64)] * 2)
    return ImageScores(*map(torch.cat, zip(*rows, strict=True)))


def _score(prediction: Any, truth: Any) -> ImageScores:
    """The scores of one image."""
    predicted, true = array_pair(prediction, truth)
    if len(predicted) != 1:
        raise ValueError(f"each prediction is one image (H, W), got shape {predicted.shape}: join batches to (N, H, W)")
    objects, surfaces = object_scores(predicted, true), surface_distances(predicted, true)
    foreground, actual = predicted != 0, true != 0
    counts = torch.tensor([[(foreground & actual).sum(), foreground.sum(), actual.sum()]])
    return ImageScores(
        *dice_and_jaccard(counts), objects.f1, objects.dice, objects.hausdorff, *surfaces, counts, objects.counts
    )
