"""Compare ways to predict images at their own size with models that were trained on smaller squares of them.

    for run in "96 --seed 0" "96 --seed 1" "128 --seed 0"; do for antialias in "" --antialias; do
        python -m semimoe_fast.train --data GlaS256 --width 16 --image-size $run $antialias --normalization glas \\
            --epochs 24 --warmup-epochs 3 --decay-epochs 6 --val-every 24 --threads 1 \\
            --out "runs/native/$run $antialias"
    done; done
    python -m benchmarks.native --runs runs/native/* --data GlaS256 --out benchmarks/results/native.json

The Dice of each image at its own size, threshold 0.5, mean over the images: six images of test A of 581 x 442 to
775 x 522 pixels, and all 60 squashed to 256 x 256, the size of the training files, which are resized as the model's
training images were. The checkpoints are those of the last epoch: nothing was chosen on these images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.folders import list_pairs, read_image, read_mask
from semimoe_fast.data.readers import Reader
from semimoe_fast.evaluation import metrics
from semimoe_fast.inference import folded, open_for, predict_image
from semimoe_fast.model import SemiMoE
from semimoe_fast.training.run_folder import LAST

from .record import commit, machine, short, write_record

Way = Callable[[np.ndarray, Preprocessing], Reader]  # open an image, uint8 (H, W, 3)


def squashed(antialias: bool) -> Way:
    return lambda image, trained: open_for(image, trained._replace(antialias=antialias))


def tiles(side: float) -> Way:
    """At the scale at which a length of `side` pixels is as long as a side of the training images."""
    return lambda image, trained: open_for(image, trained, scale=trained.image_size / side)


HEIGHT, WIDTH = 522, 775  # of most images of GlaS, and of four of the six
WAYS: dict[str, tuple[str, Way]] = {  # part of the data, how its images are read
    "native, squashed, INTER_LINEAR": ("native", squashed(antialias=False)),
    "native, squashed, antialiased": ("native", squashed(antialias=True)),
    "native, tiles, as high as the square": ("native", tiles(HEIGHT)),
    "native, tiles, as large as the square": ("native", tiles(math.sqrt(HEIGHT * WIDTH))),
    "256 x 256, squashed as in training": ("val", open_for),
}
COLUMNS = ["image size", "antialiased training", "seed", "prediction", "Dice", "Dice, --tta"]


def mean_dice(model: SemiMoE, preprocessing: Preprocessing, data: Path, part: str, way: Way, tta: bool) -> float:
    scores = []
    for image, mask in list_pairs(data, part, with_masks=True):
        pieces = predict_image(model, way(read_image(image), preprocessing), preprocessing, tta=tta)
        probability = torch.cat([fields.probability for _, fields in pieces])
        counts = metrics.count(probability[None], torch.from_numpy(read_mask(mask))[None])
        scores.append(metrics.score(counts[0]).dice)
    return float(np.mean(scores))


def measure(run: Path, data: Path) -> list[list]:
    """The rows of a run, one for each of WAYS."""
    model, metadata, _ = checkpoint.load(run / LAST)
    preprocessing = Preprocessing.of(run / LAST, metadata)
    model = folded(model, ["mask"])
    rows = []
    for name, (part, way) in WAYS.items():
        dice = [round(mean_dice(model, preprocessing, data, part, way, tta), 4) for tta in (False, True)]
        rows.append([preprocessing.image_size, preprocessing.antialias, metadata["config"]["seed"], name, *dice])
        print(*rows[-1], sep=", ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--data", type=Path, required=True, help="folder with native/ and val/, each image/ and mask/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    code = short(commit())  # of what runs now
    rows = sorted((row for run in arguments.runs for row in measure(run, arguments.data)), key=lambda row: row[:3])
    write_record(
        arguments.out,
        machine(torch.get_num_threads()),
        code,
        [line.strip() for line in __doc__.splitlines() if line.startswith("    ")],
        {"scores": {"columns": COLUMNS, "rows": rows, "format": ".3f"}},
    )


if __name__ == "__main__":
    main()
