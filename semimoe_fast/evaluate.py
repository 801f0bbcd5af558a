"""Dice and Jaccard of a checkpoint on a labelled part: `python -m semimoe_fast.evaluate --checkpoint C --data DIR`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from . import augment, checkpoint, metrics
from . import functional as F
from .checkpoint import Preprocessing
from .data import Dataset, load_part
from .device import Precision, autocast, choose_device
from .errors import UserError, run_command
from .model import Output, SemiMoE

GATED = "gated"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on a labelled part of a data folder, image by image and over all pixels.

    Predictors: the gated mask, each expert's own mask (the sdf expert's is where its field is positive), and the
    boundary expert's ring against the true ring. The swept threshold is the one with the best Jaccard on these very
    images, as the published code reports it.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    data: Path
    """Folder with PART/image and PART/mask."""
    part: str = "val"
    json: Path | None = None
    """Write the scores to this file too."""
    batch: int = 8
    device: str = "auto"
    precision: Precision = "auto"


def foreground(output: Output) -> dict[str, Tensor]:
    """Foreground probability (B, H, W) of the gated mask and of each expert's own prediction, float32."""
    mask, sdf, boundary = (own.float() for own in output.own)
    return {
        GATED: _foreground_of(output.mask.float()),
        "mask expert": _foreground_of(mask),
        "sdf expert": (sdf[:, 0].tanh() + 1) / 2,
        "boundary expert": _foreground_of(boundary),
    }


def _foreground_of(logits: Tensor) -> Tensor:
    return logits.softmax(1)[:, 1:].sum(1)


@torch.no_grad()
def count_set(
    model: SemiMoE,
    dataset: Dataset,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
    batch: int = 8,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Counts (N, 45, 3) of every predictor on a labelled set, on the CPU. The model is left in eval mode."""
    model.eval()
    counts: dict[str, list[Tensor]] = {}
    batches = list(zip(dataset.images.split(batch), dataset.masks.split(batch), strict=True))
    for images, masks in tqdm(batches, "evaluate", disable=not progress):
        masks = masks.to(device)
        _, ring = F.distance_targets(masks, preprocessing.ring_radius)
        with autocast(precision, device):
            output = model(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
        for name, probability in foreground(output).items():
            truth = ring if name == "boundary expert" else masks
            counts.setdefault(name, []).append(metrics.count(probability, truth))
    return {name: torch.cat(parts).cpu() for name, parts in counts.items()}


def score_set(counts: dict[str, Tensor]) -> dict[str, metrics.Scores]:
    """Scores over all pixels of the set, by predictor."""
    return {name: metrics.score(images.sum(0)) for name, images in counts.items()}


def table(counts: dict[str, Tensor], names: Sequence[str]) -> str:
    """The scores as text: gated image by image, then every predictor over the set."""
    header = f"{'':<28}{'Dice':>8}{'Jaccard':>9}   {'swept: Dice':>12}{'Jaccard':>9}{'threshold':>11}"
    rows = [header, *(_row(name, metrics.score(image)) for name, image in zip(names, counts[GATED], strict=True))]
    rows += ["-" * len(header), *(_row(f"all, {name}", scores) for name, scores in score_set(counts).items())]
    return "\n".join(rows)


def _row(name: str, s: metrics.Scores) -> str:
    swept = f"{s.swept_dice:12.4f}{s.swept_jaccard:9.4f}{s.swept_threshold:11.2f}"
    return f"{name[:27]:<28}{s.dice:8.4f}{s.jaccard:9.4f}   {swept}"


def as_json(counts: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    per_image = {
        name: {predictor: metrics.score(images[i])._asdict() for predictor, images in counts.items()}
        for i, name in enumerate(names)
    }
    return {"all": {name: s._asdict() for name, s in score_set(counts).items()}, "images": per_image}


def main(arguments: Sequence[str] | None = None) -> None:
    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m semimoe_fast.evaluate")
    if config.batch < 1:
        raise UserError(f"--batch is {config.batch}: give a positive number")
    device = choose_device(config.device)
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    dataset = load_part(config.data, config.part, preprocessing.image_size, with_masks=True)
    counts = count_set(model, dataset, preprocessing, device, config.precision, config.batch, progress=True)
    scores = as_json(counts, dataset.names)
    print(table(counts, dataset.names))
    print(json.dumps(scores["all"]))
    if config.json is not None:
        about = {"checkpoint": str(config.checkpoint), "data": str(config.data), "part": config.part}
        config.json.write_text(json.dumps(about | scores, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
