"""Evaluate a model, or masks that any program wrote, on the labeled files of a part, at the images' own size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import functional as F
from ..checkpoint import Preprocessing
from ..data.components import scattered
from ..data.folders import Pair, read_instances, require_size, resize_mask
from ..data.listing import match
from ..data.readers import Reader, open_image
from ..data.resampling import nearest
from ..device import Precision
from ..errors import UserError, one_line, warn
from ..inference.image import Squashed, open_for
from ..inference.predictor import GATED, is_boundary
from ..model import SemiMoE
from ..ops._arguments import MAX_SIDE
from . import metrics
from .images import ImageScores, score_images
from .summary import Summary, summarize
from .whole import at_full_size, predict_whole

FILES = "predictions"  # name of the predictor whose masks are read from files


class Variant(NamedTuple):
    """Masks that a predictor gives in one way, and their scores."""

    predictor: str
    threshold: float | None  # None: the masks are read from files
    swept: bool  # the threshold is the one with the best Jaccard over all pixels of these same images
    scores: ImageScores
    summary: Summary


@dataclass(frozen=True)
class Evaluation:
    """Scores of N images. All maps are in memory."""

    pairs: list[Pair]
    predictions: list[np.ndarray]  # (H, W) of bool or an integer dtype; of the first variant
    truths: list[np.ndarray]  # int32 instance maps (H, W)
    variants: list[Variant]
    counts: dict[str, Tensor] = field(default_factory=dict)  # of a model's predictors: pixel counts, int64 (N, 45, 3)

    @property
    def names(self) -> list[str]:
        """The stems of the images' files; what cannot be printed on a line is a backslash sequence."""
        return [one_line(pair.image.stem) for pair in self.pairs]


@torch.no_grad()
def evaluate_model(
    model: SemiMoE,
    pairs: Sequence[Pair],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
    source: Path | str = "the model",
    scale: float | None = None,
    mpp: float | None = None,
) -> Evaluation:
    """Score the gated mask at threshold 0.5 and at the swept threshold, and count the pixels of all predictors.

    Images are predicted as `predict` does it, which takes the same scale and mpp, and the probabilities are resized to
    the size of the image. Only the boundary expert is compared at the size at which the model works, where the width of
    its ring is defined. Warns of images that are resampled to `mpp`. The model is in eval mode afterwards.
    Raises UserError, which names the `source` of the model, for probabilities that are not finite; for files that
    cannot be read, and for masks that differ in size from their image.
    """
    model.eval()
    truths, levels, counts, remarks = [], [], {}, []
    for pair in tqdm(pairs, "evaluate"):
        truth = _read_truth(pair.mask)
        with open_for(pair.image, preprocessing, scale, mpp) as image:
            require_size(pair.mask, truth, pair.image, image.full_size)
            probabilities = predict_whole(model, image, preprocessing, device, precision)
        remarks += [image.note] if image.note else []
        for name, probability in probabilities.items():
            if not probability.isfinite().all():
                raise UserError(
                    f"{source} gives {pair.image} probabilities that are not finite ({name}): take the checkpoint of "
                    "an earlier epoch, or try --precision fp32"
                )
            if is_boundary(name):
                labels, field = _labels_for(image, truth)[None], probability[None]
                _, mask = F.distance_targets(labels, preprocessing.ring_radius, instances=preprocessing.instances)
            else:
                mask, field = torch.from_numpy(truth != 0)[None], at_full_size(image, probability[None])
            exceeded = metrics.levels(field.to(device))
            counts.setdefault(name, []).append(metrics.count_levels(exceeded, mask.to(device)).cpu())
            if name == GATED:
                levels.append(exceeded[0].to(torch.uint8).cpu().numpy())
        truths.append(truth)
    _warn_of_gray_values((pair.mask for pair in pairs), truths)
    if remarks:
        warn(f"{remarks[0]}{_and_more(remarks)}")
    counts = {name: torch.cat(parts) for name, parts in counts.items()}
    best = metrics.score(counts[GATED].sum(0)).swept_threshold
    variants = []
    for threshold, swept in ((metrics.THRESHOLDS[metrics.HALF], False), (best, True)):
        masks = (image > metrics.THRESHOLDS.index(threshold) for image in levels)
        scores = score_images(masks, truths)
        variants.append(Variant(GATED, threshold, swept, scores, summarize(scores)))
    return Evaluation(list(pairs), [image > metrics.HALF for image in levels], truths, variants, counts)


def _labels_for(image: Reader, truth: np.ndarray) -> Tensor:
    """The truth at the size at which an image is predicted, resized as the masks of training are."""
    if isinstance(image, Squashed):
        return resize_mask(truth, image.size[0])
    return torch.from_numpy(nearest(truth, image.size))


def evaluate_files(pairs: Sequence[Pair], folder: Path) -> Evaluation:
    """Score the masks or instance maps in a folder, one for each image and of the same stem.

    Raises UserError for missing and surplus files, for files that cannot be read or differ in size from their image.
    """
    predictions, truths, paths = [], [], match_predictions(pairs, folder)
    for pair, path in zip(tqdm(pairs, "evaluate"), paths, strict=True):
        truth, prediction = _read_truth(pair.mask), read_instances(path)
        with open_image(pair.image) as image:
            require_size(pair.mask, truth, pair.image, image.size)
            require_size(path, prediction, pair.image, image.size)
        truths.append(truth)
        predictions.append(prediction)
    _warn_of_gray_values((pair.mask for pair in pairs), truths)
    _warn_of_gray_values(paths, predictions)
    scores = score_images(predictions, truths)
    return Evaluation(list(pairs), predictions, truths, [Variant(FILES, None, False, scores, summarize(scores))])


def _read_truth(path: Path) -> np.ndarray:
    """The instance map of a mask file. Raises UserError if it is too long for distances."""
    truth = read_instances(path)
    if math.hypot(*truth.shape) > MAX_SIDE:
        raise UserError(
            f"{path} is {truth.shape[1]} x {truth.shape[0]} pixels, and distances are computed up to a diagonal of "
            f"{MAX_SIDE:,}: cut image and mask"
        )
    return truth


def match_predictions(pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """The file of each image in a folder of predictions. Raises UserError for missing and surplus files."""
    return match([pair.image for pair in pairs], folder, "prediction", "choose another --part")


def _warn_of_gray_values(paths: Iterable[Path], maps: Sequence[np.ndarray]) -> None:
    """Warn of the first map whose values are scattered: they are gray values or classes rather than ids of objects."""
    found = [path for path, labels in zip(paths, maps, strict=True) if scattered(labels)]
    if found:
        warn(f"{found[0]}{_and_more(found)} looks like gray values or classes, not ids of objects: threshold it first")


def _and_more(found: Sequence[object]) -> str:
    """What follows the first of several things in a message."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
