"""Object F1, Dice and Hausdorff distance of the GlaS challenge (Sirinukunwattana et al. 2017)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .hausdorff import least_squared_hausdorff, squared_hausdorff
from .maps import array_pair
from .runs import Objects, overlaps


class ObjectScores(NamedTuple):
    """Scores of B images, on the CPU."""

    f1: Tensor  # float64 (B,) in [0, 1]; 1 where neither map has an object
    counts: Tensor  # int64 (B, 3): true positives, false positives, false negatives
    dice: Tensor  # float64 (B,) in [0, 1]; 1 where neither map has an object, 0 where one has none
    hausdorff: Tensor  # float64 (B,) in pixels; NaN where a map has no object


def object_scores(prediction: Any, truth: Any) -> ObjectScores:
    """Object F1, Dice and Hausdorff distance of each image.

    prediction, truth: (B, H, W) or (H, W), which counts as B = 1, of bool or any integer dtype, tensors or objects that
    support DLPack -> ObjectScores of B images.

    Integers are ids of objects, 0 is background, and all pixels of one id are one object, also where they are apart.
    An image whose foreground has one value alone, whichever it is, is a mask: its 8-connected components are the
    objects.

    The best match of an object is the object of the other map that shares the most pixels with it, at a tie the one
    with the lowest id. A predicted object is a true positive if it covers more than half of its best match. Dice and
    Hausdorff distance compare each object with its best match, weighted by its share of its map's object pixels, in
    both directions. Without a match, Dice is 0 and the Hausdorff distance is the least to any object of the other map.

    Raises TypeError for floating-point maps, ValueError for other shapes, shapes that differ, or negative ids.
    """
    scores = [_score_image(*images) for images in zip(*array_pair(prediction, truth), strict=True)]
    f1, counts, dice, hausdorff = zip(*scores, strict=True) if scores else ((), (), (), ())
    return ObjectScores(
        torch.tensor(f1, dtype=torch.float64),
        torch.tensor(counts, dtype=torch.int64).reshape(-1, 3),
        torch.tensor(dice, dtype=torch.float64),
        torch.tensor(hausdorff, dtype=torch.float64),
    )


def _score_image(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, list[int], float, float]:
    predicted, true = Objects("prediction", prediction), Objects("truth", truth)
    if not len(predicted) or not len(true):
        equal = float(len(predicted) == len(true))
        return equal, [0, len(predicted), len(true)], equal, float("nan")

    predicted_number, true_number, shared = overlaps(predicted, true)
    forward = _best_matches(predicted_number, true_number, shared, len(predicted))
    backward = _best_matches(true_number, predicted_number, shared, len(true))
    true_positives = int((2 * forward.shared > true.areas[forward.match]).sum())
    counts = [true_positives, len(predicted) - true_positives, len(true) - true_positives]

    @functools.cache  # most objects are the best match of their best match
    def squared(i: int, j: int) -> int:
        return squared_hausdorff(predicted, i, true, j)

    dice = _mean_dice(predicted, true, forward) + _mean_dice(true, predicted, backward)
    hausdorff = _mean_hausdorff(predicted, true, forward, squared)
    hausdorff += _mean_hausdorff(true, predicted, backward, lambda j, i: squared(i, j))
    return 2 * true_positives / (len(predicted) + len(true)), counts, dice / 2, hausdorff / 2


class _Matches(NamedTuple):
    """The best match of each of N objects in the other map."""

    match: np.ndarray  # (N,) its number, 0 where there is none
    shared: np.ndarray  # (N,) pixels that both have, 0 where there is none


def _best_matches(these: np.ndarray, others: np.ndarray, shared: np.ndarray, count: int) -> _Matches:
    """The best match of each of `count` objects, from the pairs that `overlaps` gives."""
    order = np.lexsort((others, -shared, these))
    found, first = np.unique(these[order], return_index=True)
    best = _Matches(np.zeros(count, np.int64), np.zeros(count, np.int64))
    best.match[found] = others[order][first]
    best.shared[found] = shared[order][first]
    return best


def _mean_dice(these: Objects, others: Objects, best: _Matches) -> float:
    """The mean over the pixels of objects."""
    dice = 2 * best.shared / (these.areas + others.areas[best.match])
    return float(np.average(dice, weights=these.areas))


def _mean_hausdorff(these: Objects, others: Objects, best: _Matches, squared: Callable[[int, int], int]) -> float:
    """The mean over the pixels of objects; `squared` gives the squared distance of an object and its match."""
    distances = [
        squared(k, match) if shared else least_squared_hausdorff(these, k, others)
        for k, (match, shared) in enumerate(zip(best.match.tolist(), best.shared.tolist(), strict=True))
    ]
    return float(np.average(np.sqrt(distances), weights=these.areas))
