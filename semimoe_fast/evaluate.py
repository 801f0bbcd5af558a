"""Score a checkpoint, or masks of any program: `python -m semimoe_fast.evaluate --checkpoint C --data DIR`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from . import checkpoint
from .checkpoint import Preprocessing, write_atomically
from .data.folders import list_pairs
from .device import Precision, choose_device
from .errors import UserError, run_command
from .evaluation.files import Evaluation, evaluate_files, evaluate_model
from .evaluation.page import page
from .evaluation.tables import as_csv, as_json, as_text, notes, tables
from .inference.predictor import require_mask
from .options import read_options


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint, or masks that any program wrote, on a labeled part of a data folder.

    Print tables of scores over pixels, objects and surfaces: of each image, and of the set with 95 % intervals. Masks
    are compared at the size of the images' files. A file with several values in its foreground is an instance map;
    the objects of other masks are their 8-connected components.

    A checkpoint is scored at threshold 0.5 and, as the published code reports it, at the swept threshold: the one with
    the best Jaccard on these same images. Its experts' own masks get pixel scores (of the sdf expert, pixels with a
    positive distance; of the boundary expert, its ring against the true ring).
    """

    data: Path
    """Folder with PART/image and PART/mask."""
    checkpoint: Annotated[Path | None, "FILE", "give this or --predictions"] = None
    """best.safetensors or last.safetensors of a run folder."""
    predictions: Annotated[Path | None, "DIR", "give this or --checkpoint"] = None
    """Folder of masks or instance maps, PNG or TIFF, one for each image and of its stem."""
    part: str = "val"
    """Part of the folder to score."""
    csv: Annotated[Path | None, "FILE", "none"] = None
    """Also write one row for each image and predictor to this CSV file."""
    json: Annotated[Path | None, "FILE", "none"] = None
    """Also write all scores to this JSON file."""
    report: Annotated[Path | None, "FILE", "none"] = None
    """Also write an HTML page: tables, the run's curves, and outlines on the 20 worst images."""
    device: str = "auto"
    """Device of the checkpoint's model: auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(EvaluateConfig, "semimoe_fast.evaluate", arguments)
    if (config.checkpoint is None) == (config.predictions is None):
        given = "neither" if config.checkpoint is None else "both"
        raise UserError(f"--checkpoint and --predictions: {given} given; give exactly one of them")
    outputs = {"--csv": config.csv, "--json": config.json, "--report": config.report}
    outputs = {option: path for option, path in outputs.items() if path is not None}
    for option, path in outputs.items():
        require_writable(option, path)

    curves = None
    if config.checkpoint is not None:
        device = choose_device(config.device)
        model, metadata, _ = checkpoint.load(config.checkpoint, device)
        require_mask(config.checkpoint, model)
        preprocessing = Preprocessing.of(config.checkpoint, metadata)
        pairs = list_pairs(config.data, config.part, with_masks=True)
        evaluation = evaluate_model(model, pairs, preprocessing, device, config.precision)
        if config.report is not None:
            curves = curves_of(config.checkpoint.parent, model.tasks)
    else:
        evaluation = evaluate_files(list_pairs(config.data, config.part, with_masks=True), config.predictions)

    print("\n\n".join(map(as_text, tables(evaluation))), "", sep="\n")
    print("\n".join(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes(evaluation)))
    for option, path in outputs.items():
        text = text_of(option, config, evaluation, curves)
        write_atomically(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        print(f"written: {path}")


def require_writable(option: str, path: Path) -> None:
    """Raise UserError if a file cannot be created or replaced at a path."""
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}: create it first")
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: give a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} is {path}, which is a device or a pipe: give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} is {path}, but you may not write into {path.parent}: give another file")


def text_of(option: str, config: EvaluateConfig, evaluation: Evaluation, curves: bytes | None) -> str:
    """The content of the file that an option asks for."""
    if option == "--csv":
        return as_csv(evaluation)
    source = config.checkpoint or config.predictions
    if option == "--report":
        return page(evaluation, f"{source} on {config.data / config.part}", curves)
    kind = "checkpoint" if config.checkpoint else "predictions"
    about = {kind: str(source), "data": str(config.data), "part": config.part}
    return json.dumps(about | as_json(evaluation), indent=2, allow_nan=False) + "\n"


def curves_of(run: Path, tasks: Sequence[str]) -> bytes | None:
    """The curves of a run folder as a PNG file; None if the folder has no record of a validation."""
    from .training import records, report  # here, because Matplotlib takes long to import
    from .training.run_folder import METRICS_FILE

    path = run / METRICS_FILE
    kept = records.read(path) if path.is_file() else []
    if not any("val" in record for record in kept):
        return None
    file = io.BytesIO()
    report.draw_curves(kept, tasks, file)
    return file.getvalue()


if __name__ == "__main__":
    run_command(main)
