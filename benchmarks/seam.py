"""Draw the probabilities around the corner of a tile beside those of the whole image, and their difference.

python -m benchmarks.seam --checkpoint C --out seam.png
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import torch

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.glands import picture
from semimoe_fast.inference import predict_image
from semimoe_fast.inference.tiles import overlap_of
from semimoe_fast.options import read_options

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIDE, UNIT = 1024, 128  # pixels of the synthetic picture, and of the square that its glands are drawn for


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw a seam of tiles of a picture of synthetic glands."""

    checkpoint: Path
    """A model that is trained at the scale of `synthetic --size 128`."""
    out: Path
    """PNG file to write."""
    tile: int = 512
    """Side of the tiles in pixels."""


def main() -> None:
    options = read_options(Options, "benchmarks.seam")
    model, metadata, _ = checkpoint.load(options.checkpoint)
    preprocessing = Preprocessing.of(options.checkpoint, metadata)
    pixels = np.ascontiguousarray(picture((SIDE, SIDE), UNIT, seed=1, index=0)[0].transpose(1, 2, 0))
    tiled, whole = (
        torch.cat([piece.probability for _, piece in predict_image(model, pixels, preprocessing, tile=tile)]).numpy()
        for tile in (options.tile, SIDE)
    )
    start = options.tile - overlap_of(options.tile)  # the second tile; the overlap goes to options.tile
    middle = (start + options.tile) // 2
    part = slice(middle - UNIT, middle + UNIT)
    panels = [
        ("image", pixels[part, part], {}),
        ("tiles", tiled[part, part], {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        ("one tile", whole[part, part], {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        ("difference", (tiled - whole)[part, part], {"vmin": -0.05, "vmax": 0.05, "cmap": "RdBu"}),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
    for axis, (title, values, colors) in zip(axes, panels, strict=True):
        shown = axis.imshow(values, **colors)
        axis.set(title=title, xticks=[], yticks=[])
        for border in (start - part.start, options.tile - part.start):
            axis.axhline(border, color="tab:orange", linewidth=0.6)
            axis.axvline(border, color="tab:orange", linewidth=0.6)
    figure.colorbar(shown, ax=axes[-1])
    figure.savefig(options.out, dpi=80)
    change = np.abs(tiled - whole)
    print(f"largest difference {change.max():.3f}, mean {change.mean():.5f}")
    print(f"pixels on the other side of 0.5: {np.mean((tiled > 0.5) != (whole > 0.5)):.5%}")


if __name__ == "__main__":
    main()
