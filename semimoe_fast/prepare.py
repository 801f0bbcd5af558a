"""Lay out GlaS or CRAG for training: `python -m semimoe_fast.prepare --source DIR --out DIR --labeled 17 --seed 0`.

GlaS (Warwick QU Dataset) is one folder of train_1.bmp, train_1_anno.bmp, ..., testA_1.bmp, ..., testB_1.bmp, ...
CRAG (CRAG_v2) is train/{Images,Annotation}/*.png and valid/{Images,Annotation}/*.png. Their masks hold instance
numbers and are copied as they are: any non-zero value is gland.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data.layout import UNPACKED
from .errors import UserError, one_line, run_command
from .files import write_atomically, write_text
from .options import read_options, require_empty, training_command

Pairs = list[tuple[Path, Path]]  # image and mask
TRAIN = "train"
SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class PrepareConfig:
    """Copy GlaS or CRAG, as distributed, into train_sup_N/{image,mask}, train_unsup_M/image and val/{image,mask}.

    GlaS: val is test A, and test B becomes the part test_b. CRAG: val is its valid folder. split.json lists the images
    of every part, the seed and the source.
    """

    source: Path
    """Folder of the data set as it was unpacked, or the folder above."""
    out: Path
    """Folder to write to; it must be new or empty."""
    labeled: int = 17
    """Training images that keep their masks; the others become the unlabeled part."""
    seed: int = 0
    """Seed of the choice of labeled images."""


def prepare(config: PrepareConfig) -> tuple[str, dict[str, int]]:
    """Write the parts and split.json; return the name of the data set and the number of images in each part.

    The labeled images are the first ones in the order of a digest of seed and file name, so that a seed means the same
    split on every machine. Raises UserError for a folder that is in use, no data set, or incomplete, and where there
    are fewer training images than --labeled.
    """
    require_empty(config.out)
    name, folder, parts = _find(config.source)
    train = sorted(parts.pop(TRAIN), key=lambda pair: _digest(config.seed, pair[0].name))
    if not 1 <= config.labeled <= len(train):
        raise UserError(f"--labeled is {config.labeled}: give 1 to {len(train)}, the training images of {folder}")
    labeled, unlabeled = train[: config.labeled], train[config.labeled :]
    written = {f"train_sup_{len(labeled)}": labeled, **parts}
    if unlabeled:
        written[f"train_unsup_{len(unlabeled)}"] = unlabeled
    for part, pairs in written.items():
        _copy(pairs, config.out / part, with_masks=not part.startswith("train_unsup"))
    split = {
        "dataset": name,
        "source": str(folder.resolve()),
        "seed": config.seed,
        "parts": {
            part: sorted(image.relative_to(folder).as_posix() for image, _ in pairs) for part, pairs in written.items()
        },
    }
    write_text(config.out / SPLIT_FILE, json.dumps(split, indent=2) + "\n")
    return name, {part: len(pairs) for part, pairs in written.items()}


def _find(source: Path) -> tuple[str, Path, dict[str, Pairs]]:
    """The data set's name, its own folder and its parts, at `source` or one level below."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give --source the folder of GlaS or CRAG")
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        for name, (sign, read) in DATASETS.items():
            if next(folder.glob(sign), None) is not None:
                return name, folder, read(folder)
    signs = " nor ".join(f"{sign} ({name})" for name, (sign, _) in DATASETS.items())
    raise UserError(f"{source} has neither {signs}: give --source the folder of GlaS or CRAG as it was unpacked")


def _glas(folder: Path) -> dict[str, Pairs]:
    def pairs(prefix: str) -> Pairs:
        files = sorted(folder.glob(f"{prefix}_*.bmp"))
        masks = {path.stem.removesuffix("_anno"): path for path in files if path.stem.endswith("_anno")}
        images = [path for path in files if not path.stem.endswith("_anno")]
        return _paired(images, masks, folder / f"{prefix}_*.bmp", "{}_anno.bmp")

    return {TRAIN: pairs("train"), "val": pairs("testA"), "test_b": pairs("testB")}


def _crag(folder: Path) -> dict[str, Pairs]:
    visible = "[!.]*.png"  # macOS adds ._NAME.png

    def pairs(part: str) -> Pairs:
        masks = {path.stem: path for path in sorted((folder / part / "Annotation").glob(visible))}
        images = sorted((folder / part / "Images").glob(visible))
        return _paired(images, masks, folder / part / "Images" / "*.png", "Annotation/{}.png")

    return {TRAIN: pairs("train"), "val": pairs("valid")}


# Name: glob pattern that identifies the data set, and the function that lists its parts.
DATASETS: dict[str, tuple[str, Callable[[Path], dict[str, Pairs]]]] = {
    "GlaS": (UNPACKED["GlaS"], _glas),
    "CRAG": (UNPACKED["CRAG"], _crag),
}


def _paired(images: Sequence[Path], masks: dict[str, Path], expected: Path, mask_name: str) -> Pairs:
    """Pair images and masks by stem. Raises UserError if one has no partner or is no file, and if there are none."""
    if not images and not masks:
        raise UserError(f"{expected}: there is no such file; unpack the data set again")
    stems = {image.stem for image in images}
    for image in images:
        if image.stem not in masks:
            raise UserError(f"{image} has no mask {mask_name.format(image.stem)}: unpack the data set again")
    for stem, mask in masks.items():
        if stem not in stems:
            raise UserError(f"{mask} has no image {stem}: unpack the data set again")
    for path in (*images, *masks.values()):
        if not path.is_file():  # reading a named pipe would wait forever
            raise UserError(f"{path} is not a file: remove it, or unpack the data set again")
    return [(image, masks[image.stem]) for image in images]


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def _copy(pairs: Pairs, folder: Path, with_masks: bool) -> None:
    """Copy images, and masks under the stems of their images."""
    for image, mask in pairs:
        _copy_file(image, folder / "image" / image.name)
        if with_masks:
            _copy_file(mask, folder / "mask" / f"{image.stem}{mask.suffix}")


def _copy_file(source: Path, target: Path) -> None:
    """Not by shutil, whose error of a full disk names the source."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda part: part.write_bytes(source.read_bytes()))


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(PrepareConfig, "semimoe_fast.prepare", arguments)
    name, counts = prepare(config)
    for part, count in counts.items():
        print(one_line(f"{config.out / part}: {count} images"))
    semi_supervised = any(part.startswith("train_unsup_") for part in counts)
    print(one_line(training_command(config.out, semi_supervised, f" --normalization {name.lower()}")))


if __name__ == "__main__":
    run_command(main)
