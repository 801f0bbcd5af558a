"""Time and peak memory of predict on a synthetic slide, and how many glands it finds.

    python -m benchmarks.large_image --side 20000 --width 8 --predict="--skip-background on"
    python -m benchmarks.large_image --side 20000 --checkpoint C --predict="--skip-background on --instances"

The slide is a tiled TIFF with deflate: a checkerboard of squares of 4096 x 4096 pixels, synthetic glands (four by four
times the same picture, in which the glands are as large as in `synthetic --size 128`) and bare glass. Predict runs in a
process of its own, whose largest resident set is the figure. Without a checkpoint the weights are random, which changes
neither time nor memory of the mask. Objects drawn are counted in each picture, so a gland that touches another is two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.glands import picture
from semimoe_fast.model import SemiMoE
from semimoe_fast.options import read_options

SQUARE, PICTURE, UNIT, TILE = 4096, 1024, 128, 256  # pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """Print megapixels, seconds, megapixels a second and the peak of the resident memory, as JSON."""

    side: int = 20000
    """Side of the slide in pixels."""
    width: int = 8
    """Width of a model with random weights."""
    checkpoint: Path | None = None
    """A trained model instead."""
    predict: str = "--skip-background on"
    """Further options of predict."""


def is_tissue(row: int, column: int) -> bool:
    """Whether the square that a pixel is in shows glands."""
    return (row // SQUARE + column // SQUARE) % 2 == 0


def tiles(side: int, tissue: np.ndarray) -> Iterator[np.ndarray]:
    """The tiles of the slide, row by row, uint8 (TILE, TILE, 3)."""
    glass = np.random.default_rng(0).standard_normal(tissue.shape, np.float32) * 3 + 242
    glass = glass.round().clip(0, 255).astype(np.uint8)
    for row in range(0, side, TILE):
        for column in range(0, side, TILE):
            y, x = row % PICTURE, column % PICTURE
            yield np.ascontiguousarray((tissue if is_tissue(row, column) else glass)[y : y + TILE, x : x + TILE])


def drawn(side: int, ids: np.ndarray) -> int:
    """Number of glands on the slide."""
    return sum(
        len(np.unique(ids[: side - row, : side - column])) - 1
        for row in range(0, side, PICTURE)
        for column in range(0, side, PICTURE)
        if is_tissue(row, column)
    )


def main() -> None:
    options = read_options(Options, "benchmarks.large_image")
    with tempfile.TemporaryDirectory() as folder:
        slide, model, side = Path(folder) / "slide.tif", options.checkpoint or Path(folder) / "model", options.side
        tissue, ids = picture((PICTURE, PICTURE), UNIT, seed=1, index=0)
        layout = {"shape": (side, side, 3), "dtype": np.uint8, "tile": (TILE, TILE), "photometric": "rgb"}
        layout |= {"compression": "zlib", "compressionargs": {"level": 1}}
        tifffile.imwrite(slide, tiles(side, tissue.transpose(1, 2, 0)), **layout)
        if options.checkpoint is None:
            torch.manual_seed(0)
            preprocessing = Preprocessing(256, (0.8, 0.5, 0.8), (0.2, 0.2, 0.2), sampling="crops")._asdict()
            checkpoint.save(model, SemiMoE(width=options.width), {"preprocessing": preprocessing})
        command = f"-m semimoe_fast.predict --checkpoint {model} --input {slide} --out {folder}/out --device cpu"
        start = time.perf_counter()
        subprocess.run([sys.executable, *command.split(), *options.predict.split()], check=True)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = Path(folder, "out")
        polygons = out / "instances" / "slide.geojson"
        print(
            json.dumps(
                {name: str(value) for name, value in vars(options).items()}
                | {
                    "megapixels": side**2 / 1e6,
                    "seconds": round(seconds, 1),
                    "megapixels_per_second": round(side**2 / 1e6 / seconds, 3),
                    "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
                    "peak_gib": round(used.ru_maxrss / 2**20, 3),
                    "objects_drawn": drawn(side, ids),
                    "objects_found": polygons.read_text().count('"Feature"') if polygons.exists() else None,
                    "geojson_bytes": polygons.stat().st_size if polygons.exists() else None,
                    "torch": torch.__version__,
                    "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
                }
            )
        )


if __name__ == "__main__":
    main()
