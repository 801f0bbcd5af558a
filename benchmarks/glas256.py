"""Lay out GlaS as the measurements had it: `python -m benchmarks.glas256 --source WARWICK --out GlaS256`.

PNG files of 256 x 256 pixels: images shrunk bilinearly without antialiasing, masks of 0 and 255 by the nearest pixel.
The split is a fixed one, not that of a seed of `prepare`:

train_sup_17      the labeled images
train_unsup_68    the other training images; training ignores their masks, the upper bound and scores read them
train_all_85      all training images, of the speed run
val               the 60 images of test A
native            testA_1 to testA_6 at their own size
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from semimoe_fast.data.folders import Dataset, list_pairs, load_part, read_image, read_mask
from semimoe_fast.errors import UserError, one_line, run_command
from semimoe_fast.options import read_options, require_empty
from semimoe_fast.prepare import PrepareConfig, prepare

SIDE = 256
LABELED = {f"train_{number}" for number in (6, 13, 18, 28, 34, 37, 39, 46, 50, 52, 54, 62, 63, 65, 66, 72, 75)}
NATIVE = {f"testA_{number}" for number in range(1, 7)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Lay out GlaS in squares of 256 x 256 pixels, in the split of the measurements."""

    source: Path
    """Folder of GlaS as it was unpacked, or the folder above."""
    out: Path
    """Folder to write to; it must be new or empty."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(Options, "benchmarks.glas256", arguments)
    require_empty(options.out)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "GlaS"
        prepare(PrepareConfig(options.source, source, labeled=85))
        train = load_part(source, "train_sup_85", SIDE, with_masks=True)
        if lacking := LABELED - set(train.names):
            raise UserError(
                f"{options.source} lacks {min(lacking)}: give --source the folder of GlaS as it was unpacked"
            )
        for part, names in (
            ("train_sup_17", LABELED),
            ("train_unsup_68", set(train.names) - LABELED),
            ("train_all_85", train.names),
        ):
            write(train, names, options.out / part)
        val = load_part(source, "val", SIDE, with_masks=True)
        write(val, val.names, options.out / "val")
        for pair in list_pairs(source, "val", with_masks=True):
            if pair.image.stem in NATIVE:
                save(read_image(pair.image), read_mask(pair.mask), options.out / "native", pair.image.stem)


def write(data: Dataset, names: Collection[str], part: Path) -> None:
    """Write the images of these names and their masks."""
    for image, mask, name in zip(data.images, data.masks, data.names, strict=True):
        if name in names:
            save(image.permute(1, 2, 0).numpy(), mask.numpy(), part, name)
    print(one_line(f"{part}: {len(names)} images"))


def save(image: np.ndarray, mask: np.ndarray, part: Path, name: str) -> None:
    """Write an image, uint8 (H, W, 3), and its mask of 0 and 1 (H, W) into part/image and part/mask."""
    for kind, pixels in (("image", image), ("mask", mask * np.uint8(255))):
        (part / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(part / kind / f"{name}.png")


if __name__ == "__main__":
    run_command(main)
