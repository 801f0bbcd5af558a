"""Compare glands separated by the predicted signed distance field with 8-connected components of the predicted mask.

    python -m benchmarks.separation --checkpoint RUN/last.safetensors --data GlaS256 --parts train_sup_17 val native \\
        --out benchmarks/results/separation.json

For each part: means over its images of the object scores against the 8-connected components of the true masks, at the
size of the images (distances in pixels), and sums over its images of what is right, too much, missed, merged and split.
The file has the tables as `tables.py` reads them. Choose seed level and least area on the training images only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.folders import list_pairs, read_image, read_mask
from semimoe_fast.evaluation import object_scores
from semimoe_fast.inference import instances_of, predict_image
from semimoe_fast.inference.instances import depth

from .record import commit, machine, short, write_record

EIGHT = np.ones((3, 3))
COLUMNS = "method; F1; object Dice; object Hausdorff; right; too much; missed; merged; split".split("; ")


class Predicted(NamedTuple):
    """Prediction and true objects of one image, all (H, W)."""

    mask: np.ndarray
    sdf: np.ndarray
    truth: np.ndarray


Method = Callable[[Predicted], np.ndarray]  # -> label image (H, W)


def components(least_area: int) -> Method:
    return lambda image: instances_of(image.mask, np.zeros(image.mask.shape), least_area=least_area)  # without seeds


def by_sdf(level: float, least_area: int) -> Method:
    return lambda image: instances_of(image.mask, image.sdf, level, least_area)


def by_distance(level: float, least_area: int) -> Method:
    return lambda image: instances_of(image.mask, depth(image.mask), level, least_area)


METHODS = {
    **{f"components, at least {area} pixels": components(area) for area in (0, 100, 200)},
    **{f"sdf, level {level}, 100": by_sdf(level, 100) for level in (0.1, 0.2, 0.3, 0.4, 0.5)},
    **{f"sdf, level 0.3, {area}": by_sdf(0.3, area) for area in (0, 200)},
    **{f"distance to the background, level {level}, 100": by_distance(level, 100) for level in (0.1, 0.3, 0.5)},
}
COMPARED = "sdf, level 0.3, 100", "components, at least 100 pixels"


def predictions(path: Path, data: Path, part: str) -> list[Predicted]:
    device = torch.device("cpu")
    model, metadata, _ = checkpoint.load(path, device)
    preprocessing = Preprocessing.of(path, metadata)
    found = []
    for image_path, mask_path in list_pairs(data, part, with_masks=True):
        image = read_image(image_path)
        pieces = predict_image(model, image, preprocessing, device, fields=("probability", "sdf"))
        probability, sdf, _ = zip(*(piece for _, piece in pieces), strict=True)
        truth = ndimage.label(read_mask(mask_path), EIGHT)[0]
        found.append(Predicted((torch.cat(probability) > 0.5).numpy(), torch.cat(sdf).numpy(), truth))
    return found


def score(images: list[Predicted], method: Method) -> np.ndarray:
    """The values of COLUMNS but the first for each of N images, (N, 8)."""
    rows = []
    for image in images:
        labels = method(image)
        scores = object_scores(labels, image.truth)
        means = [x.item() for x in (scores.f1, scores.dice, scores.hausdorff)]
        rows.append([*means, *scores.counts[0].tolist(), *merged_and_split(labels, image.truth)])
    return np.array(rows)


def merged_and_split(labels: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Predicted objects that cover most of several true ones, and true objects that hold most of several predicted."""
    shared = np.zeros((labels.max() + 1, truth.max() + 1), int)
    np.add.at(shared, (labels.ravel(), truth.ravel()), 1)
    of_true, of_predicted = 2 * shared > shared.sum(0), 2 * shared > shared.sum(1, keepdims=True)
    return int((of_true[1:, 1:].sum(1) > 1).sum()), int((of_predicted[1:, 1:].sum(0) > 1).sum())


def interval(differences: np.ndarray) -> str:
    """Mean over the images (N,) and its 95 % interval by bootstrap."""
    drawn = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{differences.mean():+.3g} ({low:+.3g} to {high:+.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with PART/image and PART/mask")
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    code = short(commit())  # of what runs now
    tables, differences = {}, []
    for part in arguments.parts:
        images = predictions(arguments.checkpoint, arguments.data, part)
        scores = {name: score(images, method) for name, method in METHODS.items()}
        rows = [[name, *x[:, :3].mean(0).tolist(), *x[:, 3:].sum(0).astype(int).tolist()] for name, x in scores.items()]
        tables[part] = {"columns": COLUMNS, "rows": rows, "format": ".3f"}
        separated, whole = (scores[name][:, :3] for name in COMPARED)
        differences.append([f"{part}, {len(images)} images", *map(interval, (separated - whole).T)])
        print(part, *rows, differences[-1], sep="\n")
    tables["differences"] = {"columns": ["part", *COLUMNS[1:4]], "rows": differences}
    write_record(
        arguments.out,
        machine(torch.get_num_threads()),
        code,
        [
            "python -m semimoe_fast.train --data GlaS256 --width 16 --image-size 128 --epochs 60 --warmup-epochs 6 "
            "--threads 1 --out RUN",
            "python -m benchmarks.separation --checkpoint RUN/last.safetensors --data GlaS256 "
            f"--parts {' '.join(arguments.parts)}",
        ],
        tables,
    )


if __name__ == "__main__":
    main()
