"""Write synthetic glands as a data folder: `python -m semimoe_fast.synthetic --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .data.glands import glands
from .errors import UserError, run_command
from .options import read_options


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
    """Width and height of an image in pixels."""
    seed: int = 0
    """Seed of the random numbers that draw the pictures."""
    instances: bool = False
    """Write masks with the ids of the glands (16-bit PNG; 0: background), not 0 and 255."""


def write(folder: Folder) -> None:
    """Draw the three parts of a data set and save them below `folder.out`. All pictures are different.

    Raises UserError for a folder that is not empty and for numbers out of range.
    """
    if folder.out.exists() and not (folder.out.is_dir() and not any(folder.out.iterdir())):
        raise UserError(f"{folder.out} exists and is not an empty folder: choose another --out")
    if min(folder.labeled, folder.unlabeled, folder.val, folder.seed) < 0 or folder.size < 16:
        raise UserError(f"counts and --seed must be at least 0 and --size at least 16, but got {folder}")
    counts = [folder.labeled, folder.unlabeled, folder.val]
    images, masks = glands(sum(counts), folder.size, folder.seed, folder.labeled, folder.instances)
    masks = masks.to(torch.uint16) if folder.instances else 255 * masks
    names = [f"train_sup_{folder.labeled}", f"train_unsup_{folder.unlabeled}", "val"]
    with_masks = [True, False, True]
    for name, part, part_masks, keep in zip(names, images.split(counts), masks.split(counts), with_masks, strict=True):
        _save(folder.out / name / "image", part.permute(0, 2, 3, 1))
        if keep:
            _save(folder.out / name / "mask", part_masks)


def _save(folder: Path, pictures: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures.numpy()):
        Image.fromarray(picture).save(folder / f"{index:04d}.png")


def main() -> None:
    write(read_options(Folder, "semimoe_fast.synthetic"))


if __name__ == "__main__":
    run_command(main)
