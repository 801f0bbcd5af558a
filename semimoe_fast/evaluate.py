"""Dice and Jaccard of a checkpoint on a labeled part: `python -m semimoe_fast.evaluate --checkpoint C --data DIR`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from . import checkpoint
from .checkpoint import Preprocessing
from .data.folders import load_part
from .device import Precision, choose_device
from .errors import UserError, run_command
from .evaluation.scoring import as_json, count_set, table
from .inference.predictor import require_mask
from .options import read_options


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on a labeled part of a data folder, image by image and over all pixels.

    Print a table of scores. Predictors are the gated mask, each expert's own mask (for the sdf expert, pixels with a
    positive distance), and the boundary expert's ring against the true ring. The swept threshold is the one with the
    best Jaccard on the same images, as the published code reports it.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    data: Path
    """Folder with PART/image and PART/mask."""
    part: str = "val"
    """Part of the folder to score."""
    json: Annotated[Path | None, "FILE"] = None
    """Also write the scores to this JSON file."""
    batch: int = 8
    """Images per batch."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


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
    dataset = load_part(
        config.data, config.part, preprocessing.image_size, with_masks=True, instances=preprocessing.instances
    )
    counts = count_set(model, dataset, preprocessing, device, config.precision, config.batch, progress=True)

    print(table(counts, dataset.names))
    if config.json is not None:
        about = {"checkpoint": str(config.checkpoint), "data": str(config.data), "part": config.part}
        config.json.write_text(json.dumps(about | as_json(counts, dataset.names), indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
