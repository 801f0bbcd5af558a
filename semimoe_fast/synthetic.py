"""Write synthetic glands as a data folder: `python -m semimoe_fast.synthetic --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from .data.glands import picture
from .errors import UserError, one_line, run_command
from .files import write_png
from .options import read_options, require_empty, training_command

MOST_IMAGES = 10**6
SIDES = 16, 16384  # least and most, in pixels


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
    """Width and height of an image in pixels; with --sizes, glands are as large as in such an image."""
    sizes: Annotated[tuple[int, int] | None, "MIN MAX", "--size"] = None
    """Draw width and height of each image from MIN to MAX pixels; a larger image holds more glands."""
    seed: int = 0
    """Seed of the random numbers that draw the pictures."""
    instances: bool = False
    """Write masks with the ids of the glands (16-bit PNG; 0: background), not 0 and 255."""


def write(folder: Folder) -> None:
    """Draw the parts of a data set that have images, and save them below `folder.out`, with a progress bar.

    All pictures differ. Raises UserError for a folder that is not empty and for numbers out of range.
    """
    require_empty(folder.out)
    images = 0, MOST_IMAGES
    limits = {"labeled": images, "unlabeled": images, "val": images, "size": SIDES, "seed": (0, 2**63 - 1)}
    for name, (least, most) in limits.items():
        if not least <= (value := getattr(folder, name)) <= most:
            raise UserError(f"--{name} is {value}: give {least} to {most}")
    if folder.sizes is not None and not SIDES[0] <= folder.sizes[0] <= folder.sizes[1] <= SIDES[1]:
        low, high = folder.sizes
        raise UserError(f"--sizes is {low} {high}: give MIN of at least {SIDES[0]}, and MAX from MIN to {SIDES[1]}")
    if not folder.labeled + folder.unlabeled + folder.val:
        raise UserError("--labeled, --unlabeled and --val are 0: give one of them more")
    parts = [
        (f"train_sup_{folder.labeled}", folder.labeled, True),
        (f"train_unsup_{folder.unlabeled}", folder.unlabeled, False),
        ("val", folder.val, True),
    ]
    number = 0  # of the image among all parts
    for part, count, with_masks in parts:
        if not count:  # training refuses empty folders
            continue
        for kind in ("image", "mask") if with_masks else ("image",):
            (folder.out / part / kind).mkdir(parents=True)
        for index in tqdm(range(count), part, leave=False, disable=None):
            name = f"{index:04d}.png"
            image, ids = picture(_shape(folder, number), folder.size, folder.seed, number, number < folder.labeled)
            write_png(folder.out / part / "image" / name, image.transpose(1, 2, 0).copy())
            if with_masks:
                mask = ids.astype(np.uint16) if folder.instances else 255 * (ids > 0).astype(np.uint8)
                write_png(folder.out / part / "mask" / name, mask)
            number += 1


def _shape(folder: Folder, number: int) -> tuple[int, int]:
    """Height and width of an image."""
    if folder.sizes is None:
        return folder.size, folder.size
    low, high = folder.sizes
    height, width = np.random.default_rng([folder.seed, number, 1]).integers(low, high + 1, 2).tolist()
    return height, width


def main() -> None:
    folder = read_options(Folder, "semimoe_fast.synthetic")
    write(folder)
    counts = f"{folder.labeled} labeled, {folder.unlabeled} unlabeled and {folder.val} validation images"
    print(one_line(f"{folder.out}: {counts}"))
    if folder.labeled and folder.val:
        print(one_line(training_command(folder.out, semi_supervised=folder.unlabeled > 0)))


if __name__ == "__main__":
    run_command(main)
