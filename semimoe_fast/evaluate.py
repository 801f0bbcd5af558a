"""Dice and Jaccard of a checkpoint on a labelled part: `python -m semimoe_fast.evaluate --checkpoint C --data DIR`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import augment, checkpoint, metrics
from . import functional as F
from .checkpoint import Preprocessing
from .data import Dataset, load_part
from .device import Precision, autocast, choose_device
from .errors import UserError, run_command
from .model import Output, SemiMoE
from .options import read_options

GATED = "gated"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on a labelled part of a data folder, image by image and over all pixels.

    Prints a table, then everything as one line of JSON. Predictors: the gated mask, each expert's own mask (the sdf
    expert's is where its field is positive), and the boundary expert's ring against the true ring. The swept threshold
    is the one with the best Jaccard on these very images, as the published code reports it.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    data: Path
    """Folder with PART/image and PART/mask."""
    part: str = "val"
    """Part of the folder to score."""
    json: Annotated[Path | None, "FILE"] = None
    """Write the scores to this file too."""
    batch: int = 8
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


def gated_foreground(output: Output) -> Tensor:
    """Foreground probability (B, H, W) of the gated mask, float32."""
    return _not_background(output.mask)


def foreground(output: Output, expert_tasks: Sequence[str]) -> dict[str, Tensor]:
    """Foreground probability (B, H, W), float32, of the gated mask and of each expert's own prediction, by name."""
    probabilities = {GATED: gated_foreground(output)}
    for number, (task, own) in enumerate(zip(expert_tasks, output.own, strict=True), 1):
        name = f"{task} expert" if expert_tasks.count(task) == 1 else f"{task} expert {number}"
        probabilities[name] = (own[:, 0].float().tanh() + 1) / 2 if task == "sdf" else _not_background(own)
    return probabilities


def _not_background(logits: Tensor) -> Tensor:
    return logits.float().softmax(1)[:, 1:].sum(1)


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
        for name, probability in foreground(output, model.expert_tasks).items():
            truth = ring if name.startswith("boundary") else masks
            counts.setdefault(name, []).append(metrics.count(probability, truth))
    return {name: torch.cat(parts).cpu() for name, parts in counts.items()}


def score_set(counts: dict[str, Tensor]) -> dict[str, metrics.Scores]:
    """Scores over all pixels of the set, by predictor."""
    return {name: metrics.score(images.sum(0)) for name, images in counts.items()}


def table(counts: dict[str, Tensor], names: Sequence[str]) -> str:
    """The scores as text: for each predictor, image by image and over all pixels."""
    header = f"{'':<36}{'Dice':>8}{'Jaccard':>9}   {'swept: Dice':>12}{'Jaccard':>9}{'threshold':>11}"
    rows = [header]
    for predictor, images in counts.items():
        rows += [_row(f"{predictor}, {name}", metrics.score(image)) for name, image in zip(names, images, strict=True)]
    rows.append("-" * len(header))
    rows += [_row(f"{predictor}, all", scores) for predictor, scores in score_set(counts).items()]
    return "\n".join(rows)


def _row(name: str, s: metrics.Scores) -> str:
    swept = f"{s.swept_dice:12.4f}{s.swept_jaccard:9.4f}{s.swept_threshold:11.2f}"
    return f"{name[:35]:<36}{s.dice:8.4f}{s.jaccard:9.4f}   {swept}"


def as_json(counts: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    per_image = {
        name: {predictor: metrics.score(images[i])._asdict() for predictor, images in counts.items()}
        for i, name in enumerate(names)
    }
    return {"all": {name: s._asdict() for name, s in score_set(counts).items()}, "images": per_image}


def require_mask(path: Path, model: SemiMoE) -> None:
    """Raise UserError for a checkpoint whose experts learn no mask, or not from RGB images."""
    if model.in_channels != 3:
        raise UserError(
            f"{path}: takes images of {model.in_channels} channels, not RGB; take a checkpoint of a training run"
        )
    if "mask" not in model.tasks:
        raise UserError(f"{path}: its experts learn {', '.join(model.tasks)}, no mask; take a checkpoint with one")


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(EvaluateConfig, "semimoe_fast.evaluate", arguments)
    if config.batch < 1:
        raise UserError(f"--batch is {config.batch}: give a positive number")
    device = choose_device(config.device)
    if config.json is not None and not config.json.parent.is_dir():
        raise UserError(f"--json is {config.json}, but there is no folder {config.json.parent}: create it first")
    if config.json is not None and config.json.is_dir():
        raise UserError(f"--json is {config.json}, which is a folder: give a file")
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    dataset = load_part(config.data, config.part, preprocessing.image_size, with_masks=True)
    counts = count_set(model, dataset, preprocessing, device, config.precision, config.batch, progress=True)
    about = {"checkpoint": str(config.checkpoint), "data": str(config.data), "part": config.part}
    scores = about | as_json(counts, dataset.names)
    print(table(counts, dataset.names))
    print(json.dumps(scores))
    if config.json is not None:
        config.json.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
