"""The images of a training run: from a data folder, or synthetic glands."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from ..checkpoint import Preprocessing
from ..data.cache import Cache
from ..data.crops import crops_in
from ..data.folders import NORMALIZATION, Dataset, channel_statistics, list_pairs, load_part, read_header
from ..data.glands import glands
from ..data.ragged import Ragged, load_whole
from ..data.readers import plausible_mpp
from ..errors import UserError
from .batches import TrainingData
from .config import NONE, TrainConfig

Part = Dataset | Ragged  # of the data


def load_data(config: TrainConfig, cache: Cache | None = None) -> tuple[TrainingData, Part]:
    """The training data and the validation set of a configuration.

    cache: store of decoded images for data folders. Raises UserError if the data cannot be read or are too few.
    """
    labeled, unlabeled, val = synthetic_data(config) if config.data is None else folder_data(config, cache)
    if unlabeled is not None and config.unlabeled_batch > (count := images_in_epoch(unlabeled, config)):
        _refuse_batch("unlabeled", config.unlabeled_batch, count)
    if unlabeled is None and config.labeled_batch > (count := images_in_epoch(labeled, config)):
        _refuse_batch("labeled", config.labeled_batch, count)
    if config.normalization == "measured":
        mean, std = channel_statistics(*(pixels_of(part) for part in (labeled, unlabeled) if part is not None))
    else:
        mean, std = NORMALIZATION[config.normalization]
    scale, mpp = resolution(config)
    preprocessing = Preprocessing(
        config.image_size,
        tuple(mean),
        tuple(std),
        config.ring_radius,
        config.instances,
        config.sampling,
        antialias=config.antialias or config.sampling == "crops",  # crops see images at their own scale, unaliased
        scale=scale,
        mpp=mpp,
    )
    return TrainingData(labeled, unlabeled, preprocessing), val


def images_in_epoch(part: Part, config: TrainConfig) -> int:
    return crops_in(part, config.image_size) if isinstance(part, Ragged) else len(part)


def pixels_of(part: Part) -> Tensor:
    """All pixels, uint8 (N, 3, ...)."""
    return part.pixels if isinstance(part, Ragged) else part.images


def resolution(config: TrainConfig) -> tuple[float | None, float | None]:
    """Pixels of the model per pixel of a labeled file, the median over both sides, and microns per pixel of the model.

    The microns are those of the labeled files in the median, None unless all of them say a plausible resolution. None
    for synthetic images.
    """
    if config.data is None:
        return None, None
    files = [read_header(pair.image) for pair in list_pairs(config.data, labeled_part(config), with_masks=False)]
    scale = 1.0
    if config.sampling == "resize":
        scale = statistics.median(config.image_size / side for file in files for side in (file.height, file.width))
    microns = [plausible_mpp(25400 / file.dpi) if file.dpi else None for file in files]
    return scale, None if None in microns else statistics.median(microns) / scale


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


def folder_data(config: TrainConfig, cache: Cache | None = None) -> tuple[Part, Part | None, Part]:
    """Labeled, unlabeled and validation part of a data folder; unlabeled is None for the supervised baseline."""

    def load(part: str, with_masks: bool = True) -> Part:
        if config.sampling == "crops":
            read = load_whole if cache is None else cache.load_whole
            return read(config.data, part, with_masks, instances=config.instances)
        read = load_part if cache is None else cache.load_part
        return read(
            config.data, part, config.image_size, with_masks, instances=config.instances, antialias=config.antialias
        )

    if not config.data.is_dir():
        raise UserError(f"--data is {config.data}, which is not a folder: give the path of a folder")
    labeled = labeled_part(config)
    unlabeled = None
    if config.semi_supervised:
        unlabeled = load(config.unlabeled or only_part(config.data, "train_unsup_", "--unlabeled"), with_masks=False)
    return load(labeled), unlabeled, load(config.val)


def labeled_part(config: TrainConfig) -> str:
    return config.labeled or only_part(config.data, "train_sup_", "--labeled")


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
