"""Score a checkpoint, or masks of any program: `python -m semimoe_fast.evaluate --checkpoint C --data DIR`."""

from __future__ import annotations

import dataclasses
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from . import checkpoint
from .checkpoint import Preprocessing
from .data.folders import list_pairs
from .device import Precision, choose_device, configure_prediction
from .errors import UserError, one_line, run_command, warn
from .evaluation.files import Evaluation, evaluate_files, evaluate_model, match_predictions
from .evaluation.page import page
from .evaluation.tables import as_csv, as_json, as_text, notes, tables
from .files import write_text
from .inference.predictor import require_mask
from .inference.scale import check_scale
from .options import read_options, require_writable
from .training.config import CONFIG_FILE, read_config
from .training.run_folder import METRICS_FILE


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """What is scored, and against which masks."""

    data: Path
    """Folder with PART/image and PART/mask."""
    checkpoint: Annotated[Path | None, "FILE", "give this or --predictions"] = None
    """best.safetensors or last.safetensors of a run folder."""
    predictions: Annotated[Path | None, "DIR", "give this or --checkpoint"] = None
    """Folder of masks or instance maps, PNG or TIFF, one for each image and of its stem."""
    part: str = "val"
    """Part of the folder to score."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Files beside the tables on the screen; existing files are replaced."""

    csv: Annotated[Path | None, "FILE", "none"] = None
    """Also write one row for each image and predictor to this CSV file."""
    json: Annotated[Path | None, "FILE", "none"] = None
    """Also write all scores to this JSON file."""
    report: Annotated[Path | None, "FILE", "none"] = None
    """Also write an HTML page: tables, the run's curves, and outlines on the 20 worst images."""


@dataclasses.dataclass(frozen=True)
class ComputingOptions:
    """Only with --checkpoint."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""
    scale: Annotated[float | None, "FLOAT", "as predict"] = None
    """Predict in tiles at so many pixels of the model per pixel of the image, 0.01 to 16."""
    mpp: Annotated[float | None, "FLOAT", "as predict"] = None
    """Predict in tiles at so many microns per pixel, 0.02 to 20; the files must say their resolution."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(ComputingOptions, OutputOptions, InputOptions):  # fields and help start with the last base
    """Score a checkpoint, or masks that any program wrote, on a labeled part of a data folder.

    Print tables of scores over pixels, objects and surfaces: of each image, and of the set with 95 % intervals. Masks
    are compared at the size of the images' files. A file with several values in its foreground is an instance map,
    and each value is an object; a file with one value is a mask, and its objects are its 8-connected components.

    A checkpoint predicts at the scale at which `predict` does. It is scored at threshold 0.5 and, as the published
    code reports it, at the swept threshold: the one with the best Jaccard on these same images. Its experts' own masks
    get pixel scores (of the sdf expert, pixels with a positive distance; of the boundary expert, its ring against the
    true ring).
    """


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(EvaluateConfig, "semimoe_fast.evaluate", arguments)
    if (config.checkpoint is None) == (config.predictions is None):
        given = "neither" if config.checkpoint is None else "both"
        raise UserError(f"--checkpoint and --predictions: {given} given; give exactly one of them")
    if config.predictions is not None:
        for field in dataclasses.fields(ComputingOptions):
            if (value := getattr(config, field.name)) != field.default:
                raise UserError(f"--{field.name} is {value}, but --predictions needs no model: leave it out")
    check_scale(config.scale, config.mpp)
    outputs = {"--csv": config.csv, "--json": config.json, "--report": config.report}
    outputs = {option: path for option, path in outputs.items() if path is not None}
    for option, path in outputs.items():
        require_writable(option, path)

    pairs = list_pairs(config.data, config.part, with_masks=True)
    files = [path for pair in pairs for path in pair]
    if config.predictions is not None:
        require_distinct(outputs, [*files, *match_predictions(pairs, config.predictions)])
        evaluation, curves = evaluate_files(pairs, config.predictions), None
    else:
        run = config.checkpoint.parent
        require_distinct(outputs, [*files, config.checkpoint, run / CONFIG_FILE, run / METRICS_FILE])
        device = choose_device(config.device)
        configure_prediction(device, config.precision)
        model, metadata, _ = checkpoint.load(config.checkpoint, device)
        require_mask(config.checkpoint, model)
        preprocessing = Preprocessing.of(config.checkpoint, metadata)
        curves = None if config.report is None else curves_of(config.checkpoint, metadata, model.tasks)
        evaluation = evaluate_model(
            model, pairs, preprocessing, device, config.precision, config.checkpoint, config.scale, config.mpp
        )

    try:
        for option, path in outputs.items():
            write_text(path, text_of(option, config, evaluation, curves))
    finally:  # also if a file cannot be written; and after the files, because a closed pipe ends the command
        print("\n\n".join(map(as_text, tables(evaluation))), "", sep="\n")
        print("\n".join(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes(evaluation)))
    for path in outputs.values():
        print(f"written: {one_line(str(path))}")


def require_distinct(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Raise UserError if an option's file would replace an input, or the file of another option."""
    taken = {path.resolve(): "an input" for path in inputs}
    for option, path in outputs.items():
        if (use := taken.setdefault(path.resolve(), f"the file of {option}")) != f"the file of {option}":
            raise UserError(f"{option} is {path}, which is {use} too: give another file")


def text_of(option: str, config: EvaluateConfig, evaluation: Evaluation, curves: bytes | None) -> str:
    """The content of the file that an option asks for."""
    if option == "--csv":
        return as_csv(evaluation)
    source = config.checkpoint or config.predictions
    if option == "--report":
        return page(evaluation, f"{source} on {config.data / config.part}", curves)
    kind = "checkpoint" if config.checkpoint else "predictions"
    about = {kind: source, "data": config.data, "part": config.part}
    about = {name: one_line(str(value)) for name, value in about.items()}
    about |= {name: value for name in ("scale", "mpp") if (value := getattr(config, name)) is not None}
    return json.dumps(about | as_json(evaluation), indent=2, allow_nan=False) + "\n"


def curves_of(path: Path, metadata: Mapping[str, Any], tasks: Sequence[str]) -> bytes | None:
    """The curves of a checkpoint's run as a PNG file, from the record in the checkpoint's folder.

    None if the folder has no record of a validation; also, with a warning, if its record is that of another run.
    """
    from .training import records, report  # here, because Matplotlib takes long to import
    from .training.run import lasting

    record = path.parent / METRICS_FILE
    if not record.is_file():
        return None
    try:
        same = lasting(read_config(path.parent).to_dict()) == lasting(metadata.get("config"))
    except UserError:
        same = False
    if not same:
        warn(f"{record} is left out of the report: no {CONFIG_FILE} beside it says that {path} is of the same run")
        return None
    kept = records.read(record)
    if not any("val" in row for row in kept):
        return None
    file = io.BytesIO()
    report.draw_curves(kept, tasks, file)
    return file.getvalue()


if __name__ == "__main__":
    run_command(main)
