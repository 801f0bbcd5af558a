"""The images of a training run: from a data folder, or synthetic glands."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data.cache import Cache
from ..data.components import scattered
from ..data.crops import crops_in
from ..data.folders import (
    NORMALIZATION,
    Dataset,
    channel_statistics,
    list_pairs,
    load_part,
    read_header,
    read_labels,
)
from ..data.glands import glands
from ..data.layout import part_folder
from ..data.ragged import Ragged, load_whole
from ..data.readers import mpp_of
from ..data.scaled import differs
from ..errors import UserError
from .batches import TrainingData
from .config import NONE, TrainConfig

Part = Dataset | Ragged  # of the data
MOST_LOOKED_AT = 2**24  # pixels of a mask file that is read to say something about it


class Parts(NamedTuple):
    """Names of the parts of a data folder."""

    labeled: str
    unlabeled: str | None  # None for the supervised baseline
    val: str


class Scale(NamedTuple):
    """The scale at which a model works."""

    scale: float | None = None  # pixels of the model per pixel of a labeled file, the median over both sides
    mpp: float | None = None  # microns per pixel of the model
    note: str | None = None  # what a run says about files that are resampled, in one line


def load_data(config: TrainConfig, cache: Cache | None = None) -> tuple[TrainingData, Part]:
    """The training data and the validation set of a configuration.

    cache: store of decoded images for data folders. Raises UserError if the data cannot be read or are too few.
    """
    if config.data is None:
        (labeled, unlabeled, val), scale = synthetic_data(config), Scale()
    else:
        parts = parts_of(config)
        scale = scale_of(config, parts)
        labeled, unlabeled, val = folder_data(config, parts, scale.mpp, cache)
    if unlabeled is not None and config.unlabeled_batch > (count := images_in_epoch(unlabeled, config)):
        _refuse_batch("unlabeled", config.unlabeled_batch, count)
    if unlabeled is None and config.labeled_batch > (count := images_in_epoch(labeled, config)):
        _refuse_batch("labeled", config.labeled_batch, count)
    if config.normalization == "measured":
        mean, std = channel_statistics(*(pixels_of(part) for part in (labeled, unlabeled) if part is not None))
    else:
        mean, std = NORMALIZATION[config.normalization]
    preprocessing = Preprocessing(
        config.image_size,
        tuple(mean),
        tuple(std),
        config.ring_radius,
        config.instances,
        config.sampling,
        antialias=config.antialias or config.mpp is not None,
        scale=scale.scale,
        mpp=scale.mpp,
    )
    return TrainingData(labeled, unlabeled, preprocessing, scale.note), val


def images_in_epoch(part: Part, config: TrainConfig) -> int:
    return crops_in(part, config.image_size) if isinstance(part, Ragged) else len(part)


def pixels_of(part: Part) -> Tensor:
    """All pixels, uint8 (N, 3, ...)."""
    return part.pixels if isinstance(part, Ragged) else part.images


def scale_of(config: TrainConfig, parts: Parts) -> Scale:
    """The scale at which the model of a run works, from the headers of the files.

    Crops are cut at --mpp, else at the scale of the files. Without --mpp, the microns per pixel are those of the
    labeled files in the median, None unless all of them say theirs. The validation images are read at them, as
    `predict` reads images. Raises UserError for a file that does not say its resolution, with --mpp.
    """
    labeled = microns_of(config.data, parts.labeled)
    if config.mpp is not None:
        every = [own for part in parts if part for own in microns_of(config.data, part, required=True)]
        return Scale(statistics.median(labeled) / config.mpp, config.mpp, note(every, config.mpp))
    known = None if None in labeled else statistics.median(labeled)
    if config.sampling == "crops":
        return Scale(1.0, known, note(microns_of(config.data, parts.val), known))
    sides = [
        side for pair in list_pairs(config.data, parts.labeled, with_masks=False) for side in read_header(pair.image)
    ]
    scale = statistics.median(config.image_size / side for side in sides)
    return Scale(scale, known and known / scale)


def microns_of(root: Path, part: str, required: bool = False) -> list[float | None]:
    """Microns per pixel of each image of a part. required: raise UserError for the first one that does not say so."""
    microns = {pair.image: mpp_of(pair.image) for pair in list_pairs(root, part, with_masks=False)}
    for path, own in microns.items() if required else ():
        if own is None:
            raise UserError(
                f"{path} does not say how large its pixels are, which --mpp needs: save it with its resolution (TIFF "
                "tags, OME-XML, dpi of a PNG), or leave out --mpp"
            )
    return list(microns.values())


def note(microns: Iterable[float | None], mpp: float | None) -> str | None:
    """One line about the files, of so many microns a pixel, that are resampled to `mpp`; None if there are none."""
    if not (resampled := sorted(own for own in microns if differs(own, mpp))):
        return None
    low, high = (f"{own:.3g}" for own in (resampled[0], resampled[-1]))
    spread = low if low == high else f"{low} to {high}"
    return f"{len(resampled)} images of {spread} microns a pixel are resampled to {mpp:.3g}"


def note_of_masks(config: TrainConfig, labeled: Part) -> str | None:
    """One line if all labeled masks are empty or full, or if the first mask file has other values than a mask.

    Those are ids without --instances, and gray values. It decodes that file, unless it is large.
    """
    if config.data is None:
        return None
    part = config.labeled or only_part(config.data, "train_sup_", "--labeled")

    def masks() -> Iterable[Tensor]:
        return labeled.masks if isinstance(labeled, Dataset) else map(labeled.mask, range(len(labeled)))

    of_all = f"all {len(labeled)} masks of {part}"
    if not any(bool(mask.any()) for mask in masks()):
        size = f" at --image-size {config.image_size}" if isinstance(labeled, Dataset) else ""
        return f"{of_all} are 0{size}, so there is no gland to learn: check the masks"
    if all(bool(mask.all()) for mask in masks()):
        return f"{of_all} are gland everywhere, so there is no background to learn: check the masks"
    path = list_pairs(config.data, part, with_masks=True)[0].mask
    if math.prod(read_header(path)) > MOST_LOOKED_AT:
        return None
    labels = read_labels(path)
    if (values := len(np.unique(labels[labels != 0]))) < 2:
        return None
    what = f"{path} has {values} values that are not 0"
    if scattered(labels):
        return (
            f"{what} and look like gray values or classes, not ids; if not all of them are gland, threshold the masks"
        )
    return None if config.instances else f"{what}, all gland; if they are ids, --instances keeps touching glands apart"


def _refuse_batch(kind: str, batch: int, images: int) -> NoReturn:
    raise UserError(f"--{kind}-batch is {batch}, but there are {images} {kind} images: give at most {images}")


def synthetic_data(config: TrainConfig) -> tuple[Dataset, Dataset | None, Dataset]:
    """Labeled, unlabeled and validation part of synthetic glands; unlabeled is None for the supervised baseline.

    With --scale-jitter, the pixels of training images have the size and the noise of the largest magnification.
    """
    stored = magnified_size(config)
    sizes = stored, stored, config.image_size
    parts, start = [], 0
    for count, size in zip(config.synthetic, sizes, strict=True):
        images, masks = glands(count, size, config.seed, config.synthetic[0], config.instances, start)
        parts.append(Dataset(images, masks, [f"synthetic_{start + i}" for i in range(count)]))
        start += count
    labeled, unlabeled, val = parts
    return labeled, unlabeled if config.semi_supervised else None, val


def folder_data(
    config: TrainConfig, parts: Parts, mpp: float | None, cache: Cache | None = None
) -> tuple[Part, Part | None, Part]:
    """The parts of a data folder. mpp: microns a pixel at which validation images are read, with --mpp all images."""

    def load(part: str, size: int, with_masks: bool = True, mpp: float | None = config.mpp) -> Part:
        if config.sampling == "crops":
            read = load_whole if cache is None else cache.load_whole
            return read(config.data, part, with_masks, instances=config.instances, mpp=mpp)
        read = load_part if cache is None else cache.load_part
        return read(config.data, part, size, with_masks, instances=config.instances, antialias=config.antialias)

    size = stored_size(config, parts)
    unlabeled = None if parts.unlabeled is None else load(parts.unlabeled, size, with_masks=False)
    return load(parts.labeled, size), unlabeled, load(parts.val, config.image_size, mpp=mpp)


def stored_size(config: TrainConfig, parts: Parts) -> int:
    """Side of the stored training images: magnified ones are sharp if the files are so large; no file is enlarged."""
    if config.scale_jitter is None or config.sampling == "crops":
        return config.image_size
    pairs = [p for part in (parts.labeled, parts.unlabeled) if part for p in list_pairs(config.data, part, False)]
    smallest = min(side for pair in pairs for side in read_header(pair.image))
    return max(config.image_size, min(magnified_size(config), smallest))


def magnified_size(config: TrainConfig) -> int:
    """Side of an image whose largest magnification has a pixel of its own for each pixel of a square."""
    return round(config.image_size * (config.scale_jitter or 1))


def parts_of(config: TrainConfig) -> Parts:
    """The parts that the options choose. Raises UserError if there is no folder, or no part to choose."""
    if not config.data.is_dir():
        remedy = "the path of a folder" if config.resume is None else f"the new path of the data of {config.resume}"
        raise UserError(f"--data is {config.data}, which is not a folder: give {remedy}")
    labeled = config.labeled or only_part(config.data, "train_sup_", "--labeled")
    unlabeled = None
    if config.semi_supervised:
        unlabeled = config.unlabeled or only_part(config.data, "train_unsup_", "--unlabeled")
    if config.val == NONE:
        raise UserError(f"--val is {NONE}, but a run needs images to validate on: give the name of a part")
    return Parts(labeled, unlabeled, config.val)


def with_parts(config: TrainConfig) -> TrainConfig:
    """The configuration with the names of its parts, so that a run goes on with them if its folder gets others."""
    if config.data is None:
        return config
    parts = parts_of(config)
    return dataclasses.replace(config, labeled=parts.labeled, unlabeled=parts.unlabeled or NONE)


def only_part(root: Path, prefix: str, flag: str) -> str:
    """The only part of a data folder whose name starts with the prefix. Raises UserError if there are 0 or several."""
    parts = sorted(path.parent.name for path in root.glob("*/image"))
    found = [part for part in parts if part.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    incomplete = sorted(path.name for path in root.glob(f"{prefix}*") if path.is_dir())
    if not found and (incomplete or not parts):
        part_folder(root, [*incomplete, f"{prefix}N"][0], "image")  # raises, and says what is there instead
    hint = f", or {flag} {NONE} for the supervised baseline" if flag == "--unlabeled" else ""
    raise UserError(
        f"{root}: {len(found)} parts are named {prefix}*; choose one with {flag} NAME{hint} "
        f"(parts of this folder: {', '.join(found or parts)})"
    )
