"""Write synthetic glands as a data folder: `python -m semimoe_fast.synthetic --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from tqdm import tqdm

from .checkpoint import write_atomically
from .data.glands import picture
from .errors import UserError, one_line, run_command
from .options import read_options

MOST_IMAGES, MOST_SIDE = 10**6, 16384


@dataclass(frozen=True)
class Folder:
    """Write synthetic glands as PNG files: train_sup_N/{image,mask}, train_unsup_M/image and val/{image,mask}."""

    out: Path
    """Folder to write to; it must be new or empty."""
    labeled: int = 16
    """Images with masks to train on."""
    unlabeled: int = 64
    """Images without masks to train on."""
    val: int = 32
    """Images with masks to validate on."""
    size: int = 128
    """Width and height of an image in pixels; with --sizes, of an image whose glands have the same size."""
    sizes: Annotated[tuple[int, int] | None, "MIN MAX", "--size"] = None
    """Draw width and height of each image from MIN to MAX pixels; a larger image holds more glands."""
    seed: int = 0
    """Seed of the random numbers that draw the pictures."""
    instances: bool = False
    """Write masks with the ids of the glands (16-bit PNG; 0: background), not 0 and 255."""


def write(folder: Folder) -> None:
    """Draw the three parts of a data set and save them below `folder.out`, with a progress bar. All pictures differ.

    Raises UserError for a folder that is not empty and for numbers out of range.
    """
    if folder.out.exists() and not (folder.out.is_dir() and not any(folder.out.iterdir())):
        raise UserError(f"{folder.out} exists and is not an empty folder: choose another --out")
    if min(folder.labeled, folder.unlabeled, folder.val, folder.seed) < 0 or folder.size < 16:
        raise UserError(f"counts and --seed must be at least 0 and --size at least 16, but got {folder}")
    largest = max([folder.size, *(folder.sizes or ())])
    if max(folder.labeled, folder.unlabeled, folder.val) > MOST_IMAGES or largest > MOST_SIDE:
        raise UserError(f"counts are at most {MOST_IMAGES:,} and sides at most {MOST_SIDE:,} pixels, but got {folder}")
    if folder.seed >= 2**63:
        raise UserError(f"--seed is {folder.seed}: give at most {2**63 - 1}")
    if folder.sizes is not None and not 16 <= folder.sizes[0] <= folder.sizes[1]:
        raise UserError(f"--sizes is {folder.sizes}: give MIN of at least 16 and MAX of at least MIN")
    parts = [
        (f"train_sup_{folder.labeled}", folder.labeled, True),
        (f"train_unsup_{folder.unlabeled}", folder.unlabeled, False),
        ("val", folder.val, True),
    ]
    number = 0  # of the image among all parts
    for part, count, with_masks in parts:
        for kind in ("image", "mask") if with_masks else ("image",):
            (folder.out / part / kind).mkdir(parents=True)
        for index in tqdm(range(count), part, leave=False, disable=None):
            name = f"{index:04d}.png"
            image, ids = picture(_shape(folder, number), folder.size, folder.seed, number, number < folder.labeled)
            _save(image.transpose(1, 2, 0).copy(), folder.out / part / "image" / name)
            if with_masks:
                mask = ids.astype(np.uint16) if folder.instances else 255 * (ids > 0).astype(np.uint8)
                _save(mask, folder.out / part / "mask" / name)
            number += 1


def _shape(folder: Folder, number: int) -> tuple[int, int]:
    """Height and width of an image."""
    if folder.sizes is None:
        return folder.size, folder.size
    low, high = folder.sizes
    height, width = np.random.default_rng([folder.seed, number, 1]).integers(low, high + 1, 2).tolist()
    return height, width


def _save(pixels: np.ndarray, path: Path) -> None:
    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, "PNG"))


def main() -> None:
    folder = read_options(Folder, "semimoe_fast.synthetic")
    write(folder)
    counts = f"{folder.labeled} labeled, {folder.unlabeled} unlabeled and {folder.val} validation images"
    print(one_line(f"{folder.out}: {counts}"))


if __name__ == "__main__":
    run_command(main)
