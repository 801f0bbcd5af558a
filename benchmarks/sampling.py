"""Compare training on whole images resized to squares with training on crops, on synthetic images of mixed sizes.

    python -m benchmarks.sampling --out benchmarks/results/sampling.json

All runs take the same number of steps of the same batches of S x S pixels. The scores are those of the validation
images at their own size: pixel Dice at threshold 0.5, and F1 of objects, which the sdf expert separates. The prediction
of a model of resized images is resized to the size of the image, as `predict` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semimoe_fast import checkpoint, synthetic, train
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.folders import list_pairs, read_instances
from semimoe_fast.evaluation import object_scores
from semimoe_fast.evaluation.whole import at_full_size, predict_whole
from semimoe_fast.inference import instances_of, open_for
from semimoe_fast.inference.predictor import GATED
from semimoe_fast.model import SemiMoE
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.run_folder import LAST

from .record import commit, machine, short, write_record

CPU = torch.device("cpu")
FOLDER = synthetic.Folder(Path(), labeled=8, unlabeled=32, val=12, size=256, sizes=(400, 1200), instances=True)
RECIPES = {
    "resize": {},
    "resize, antialias": {"antialias": True},
    "crops": {"sampling": "crops"},
}
COLUMNS = ["sampling", "seed", "pixel Dice", "object F1"]


def configuration(data: Path, out: Path, image_size: int, steps: int, seed: int, **changes) -> TrainConfig:
    """Ten epochs, at any number of steps, so that all runs have the same schedule."""
    return dataclasses.replace(
        SYNTHETIC,
        data=data,
        out=out,
        image_size=image_size,
        epochs=10,
        warmup_epochs=1,
        decay_epochs=3,
        steps_per_epoch=steps // 10,
        val_every=10,
        seed=seed,
        device="cpu",
        **changes,
    )


def probabilities(model: SemiMoE, path: Path, preprocessing: Preprocessing) -> dict[str, Tensor]:
    """Foreground probabilities (H, W) of each predictor at the size of an image."""
    with open_for(path, preprocessing) as image:
        fields = predict_whole(model, image, preprocessing, CPU)
        return {name: at_full_size(image, field[None])[0] for name, field in fields.items()}


def score(path: Path, data: Path) -> tuple[float, float]:
    """Dice over all pixels and mean F1 of the objects of the validation images."""
    model, metadata, _ = checkpoint.load(path)
    preprocessing = Preprocessing.of(path, metadata)
    common = total = 0
    f1 = []
    for pair in list_pairs(data, "val", with_masks=True):
        truth = read_instances(pair.mask)
        found = probabilities(model, pair.image, preprocessing)
        mask, sdf = (found[GATED] > 0.5).numpy(), (2 * found["sdf expert"] - 1).numpy()
        common += 2 * int((mask & (truth != 0)).sum())
        total += int(mask.sum()) + int((truth != 0).sum())
        f1.append(object_scores(instances_of(mask, sdf), truth).f1.item())
    return common / total, float(np.mean(f1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600, help="of each run, a multiple of 10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    code = short(commit())  # of what runs now
    rows = []
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        synthetic.write(dataclasses.replace(FOLDER, out=data))
        for seed in arguments.seeds:
            for name, changes in RECIPES.items():
                run = Path(work) / f"{name} {seed}"
                train.main(configuration(data, run, arguments.image_size, arguments.steps, seed, **changes))
                rows.append([name, seed, *(round(x, 4) for x in score(run / LAST, data))])
                print(rows[-1], flush=True)
    write_record(
        arguments.out,
        machine(torch.get_num_threads()),
        code,
        [
            f"python -m benchmarks.sampling --image-size {arguments.image_size} --steps {arguments.steps} "
            f"--seeds {' '.join(map(str, arguments.seeds))} --out benchmarks/results/sampling.json"
        ],
        {"scores": {"columns": COLUMNS, "rows": rows, "format": ".3f"}},
    )


if __name__ == "__main__":
    main()
