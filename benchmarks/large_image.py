"""Time and peak memory of predict on a synthetic slide: `python -m benchmarks.large_image --side 20000 --width 8`.

The slide is a tiled TIFF with deflate: fields of synthetic glands of 1024 x 1024 pixels, and as many fields of bare
glass, in a checkerboard of squares of four by four fields. Predict runs in a process of its own, whose largest resident
set is the figure; the weights are random, which changes neither time nor memory.
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
from semimoe_fast.data.glands import glands
from semimoe_fast.model import SemiMoE
from semimoe_fast.options import read_options

FIELD, SQUARE, TILE = 1024, 4, 256  # pixels; fields; pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """Print megapixels, seconds, megapixels a second and the peak of the resident memory, as JSON."""

    side: int = 20000
    """Side of the slide in pixels."""
    width: int = 8
    """Width of the model."""
    predict: str = "--skip-background on"
    """Further options of predict."""


def tiles(side: int) -> Iterator[np.ndarray]:
    """The tiles of the slide, row by row, uint8 (TILE, TILE, 3)."""
    rng = np.random.default_rng(0)
    tissue = glands(1, FIELD, seed=0)[0][0].permute(1, 2, 0).numpy()
    glass = (rng.standard_normal(tissue.shape) * 3 + 242).round().clip(0, 255).astype(np.uint8)
    for row in range(0, side, TILE):
        for column in range(0, side, TILE):
            field = glass if (row // (FIELD * SQUARE) + column // (FIELD * SQUARE)) % 2 else tissue
            y, x = row % FIELD, column % FIELD
            yield np.ascontiguousarray(field[y : y + TILE, x : x + TILE])


def main() -> None:
    options = read_options(Options, "benchmarks.large_image")
    with tempfile.TemporaryDirectory() as folder:
        slide, model, side = Path(folder) / "slide.tif", Path(folder) / "model", options.side
        layout = {"shape": (side, side, 3), "dtype": np.uint8, "tile": (TILE, TILE), "photometric": "rgb"}
        tifffile.imwrite(slide, tiles(side), **layout, compression="zlib", compressionargs={"level": 1})
        torch.manual_seed(0)
        preprocessing = Preprocessing(256, (0.8, 0.5, 0.8), (0.2, 0.2, 0.2), sampling="crops")._asdict()
        checkpoint.save(model, SemiMoE(width=options.width), {"preprocessing": preprocessing})
        command = f"-m semimoe_fast.predict --checkpoint {model} --input {slide} --out {folder}/out --device cpu"
        start = time.perf_counter()
        subprocess.run([sys.executable, *command.split(), *options.predict.split()], check=True)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            json.dumps(
                dataclasses.asdict(options)
                | {
                    "megapixels": side**2 / 1e6,
                    "seconds": round(seconds, 1),
                    "megapixels_per_second": round(side**2 / 1e6 / seconds, 3),
                    "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
                    "peak_gib": round(used.ru_maxrss / 2**20, 3),
                    "mask_bytes": sum(path.stat().st_size for path in Path(folder, "out").iterdir()),
                    "torch": torch.__version__,
                    "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
                }
            )
        )


if __name__ == "__main__":
    main()
