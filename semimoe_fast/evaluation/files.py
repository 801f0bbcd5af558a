"""Evaluate a model, or masks that any program wrote, on the labeled files of a part, at the images' own size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import functional as F
from ..checkpoint import Preprocessing
from ..data.folders import Pair, list_images, read_image, read_instances, resize_mask
from ..device import Precision
from ..errors import UserError
from ..inference.predictor import GATED, foreground, predict, resize_field
from ..model import SemiMoE
from . import metrics
from .images import ImageScores, score_images
from .summary import Summary, summarize

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
        return [pair.image.stem for pair in self.pairs]


@torch.no_grad()
def evaluate_model(
    model: SemiMoE,
    pairs: Sequence[Pair],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
) -> Evaluation:
    """Score the gated mask at threshold 0.5 and at the swept threshold, and count the pixels of all predictors.

    Probabilities are resized to the size of the image, as predict does it. Only the boundary expert is compared
    at the training size, at which the width of its ring is defined. The model is in eval mode afterwards.
    Raises UserError for files that cannot be read and for masks that differ in size from their image.
    """
    model.eval()
    truths, levels, counts = [], [], {}
    for pair in tqdm(pairs, "evaluate"):
        image, truth = read_image(pair.image), read_instances(pair.mask)
        _require_size(pair.mask, truth, pair.image, image)
        output = predict(model, image, preprocessing, device, precision)
        for name, probability in foreground(output, model.expert_tasks).items():
            if name.startswith("boundary"):
                labels = resize_mask(truth, preprocessing.image_size)[None]
                _, mask = F.distance_targets(labels, preprocessing.ring_radius, instances=preprocessing.instances)
            else:
                mask = torch.from_numpy(truth != 0)[None]
                probability = resize_field(probability, truth.shape)
            exceeded = metrics.levels(probability)
            counts.setdefault(name, []).append(metrics.count_levels(exceeded, mask.to(device)).cpu())
            if name == GATED:
                levels.append(exceeded[0].to(torch.uint8).cpu().numpy())
        truths.append(truth)
    counts = {name: torch.cat(parts) for name, parts in counts.items()}
    best = metrics.score(counts[GATED].sum(0)).swept_threshold
    variants = []
    for threshold, swept in ((metrics.THRESHOLDS[metrics.HALF], False), (best, True)):
        masks = (image > metrics.THRESHOLDS.index(threshold) for image in levels)
        scores = score_images(masks, truths)
        variants.append(Variant(GATED, threshold, swept, scores, summarize(scores)))
    return Evaluation(list(pairs), [image > metrics.HALF for image in levels], truths, variants, counts)


def evaluate_files(pairs: Sequence[Pair], folder: Path) -> Evaluation:
    """Score the masks or instance maps in a folder, one for each image and of the same stem.

    Raises UserError for missing and surplus files, for files that cannot be read or differ in size from their image.
    """
    predictions, truths, paths = [], [], _paired(pairs, folder)
    for pair, path in zip(tqdm(pairs, "evaluate"), paths, strict=True):
        truth, prediction = read_instances(pair.mask), read_instances(path)
        image = read_image(pair.image)
        _require_size(pair.mask, truth, pair.image, image)
        _require_size(path, prediction, pair.image, image)
        truths.append(truth)
        predictions.append(prediction)
    scores = score_images(predictions, truths)
    return Evaluation(list(pairs), predictions, truths, [Variant(FILES, None, False, scores, summarize(scores))])


def _paired(pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """The file of each image in a folder of predictions."""
    files = {path.stem: path for path in list_images(folder)}
    stems = {pair.image.stem: pair.image for pair in pairs}
    for stem, image in stems.items():
        if stem not in files:
            raise UserError(f"{image} has no prediction: add {folder / stem}.png, or choose another --part")
    if surplus := sorted(files.keys() - stems.keys()):
        number = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise UserError(
            f"{files[surplus[0]]}{number} is a prediction without an image in {pairs[0].image.parent}: remove it, or "
            "choose another --part"
        )
    return [files[stem] for stem in stems]


def _require_size(path: Path, labels: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    (height, width), (rows, columns) = image.shape[:2], labels.shape
    if (height, width) != (rows, columns):
        raise UserError(
            f"{image_path} is {width} x {height} pixels but {path} is {columns} x {rows}: give it the size of its image"
        )
