"""The images of a training run: from a data folder, or synthetic glands."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from ..checkpoint import Preprocessing
from ..data.cache import Cache
from ..data.folders import NORMALIZATION, Dataset, channel_statistics, load_part
from ..data.glands import glands
from ..errors import UserError
from .batches import TrainingData
from .config import NONE, TrainConfig


def load_data(config: TrainConfig, cache: Cache | None = None) -> tuple[TrainingData, Dataset]:
    """The training data and the validation set of a configuration.

    cache: store of decoded images for data folders. Raises UserError if the data cannot be read or are too few.
    """
    labeled, unlabeled, val = synthetic_data(config) if config.data is None else folder_data(config, cache)
    if unlabeled is not None and config.unlabeled_batch > len(unlabeled):
        _refuse_batch("unlabeled", config.unlabeled_batch, len(unlabeled))
    if unlabeled is None and config.labeled_batch > len(labeled):
        _refuse_batch("labeled", config.labeled_batch, len(labeled))
    if config.normalization == "measured":
        mean, std = channel_statistics(*(part.images for part in (labeled, unlabeled) if part is not None))
    else:
        mean, std = NORMALIZATION[config.normalization]
    preprocessing = Preprocessing(config.image_size, tuple(mean), tuple(std), config.ring_radius, config.instances)
    return TrainingData(labeled, unlabeled, preprocessing), val


def _refuse_batch(kind: str, batch: int, images: int) -> NoReturn:
    raise UserError(f"--{kind}-batch is {batch}, but there are {images} {kind} images: give at most {images}")


def synthetic_data(config: TrainConfig) -> tuple[Dataset, Dataset | None, Dataset]:
    """Labeled, unlabeled and validation part of synthetic glands; unlabeled is None for the supervised baseline."""
    images, masks = glands(sum(config.synthetic), config.image_size, config.seed, config.synthetic[0], config.instances)
    names = [f"synthetic_{i}" for i in range(len(images))]
    parts = []
    for part_images, part_masks in zip(images.split(config.synthetic), masks.split(config.synthetic), strict=True):
        start = sum(len(part) for part in parts)
        parts.append(Dataset(part_images, part_masks, names[start : start + len(part_images)]))
    labeled, unlabeled, val = parts
    return labeled, unlabeled if config.semi_supervised and len(unlabeled) else None, val


def folder_data(config: TrainConfig, cache: Cache | None = None) -> tuple[Dataset, Dataset | None, Dataset]:
    """Labeled, unlabeled and validation part of a data folder; unlabeled is None for the supervised baseline."""
    load = load_part if cache is None else cache.load_part
    if not config.data.is_dir():
        raise UserError(f"--data is {config.data}, which is not a folder: give the path of a folder")
    labeled = config.labeled or only_part(config.data, "train_sup_", "--labeled")
    unlabeled = None
    if config.semi_supervised:
        name = config.unlabeled or only_part(config.data, "train_unsup_", "--unlabeled")
        unlabeled = load(config.data, name, config.image_size, with_masks=False)
    return (
        load(config.data, labeled, config.image_size, with_masks=True, instances=config.instances),
        unlabeled,
        load(config.data, config.val, config.image_size, with_masks=True, instances=config.instances),
    )


def only_part(root: Path, prefix: str, flag: str) -> str:
    """The only part of a data folder whose name starts with the prefix. Raises UserError if there are 0 or several."""
    parts = sorted(path.parent.name for path in root.glob("*/image"))
    found = [part for part in parts if part.startswith(prefix)]
    if len(found) != 1:
        hint = f", or {flag} {NONE} for the supervised baseline" if flag == "--unlabeled" else ""
        raise UserError(
            f"{root}: {len(found)} parts are named {prefix}*; choose one with {flag} NAME{hint} "
            f"(parts of this folder: {', '.join(parts) or NONE})"
        )
    return found[0]
