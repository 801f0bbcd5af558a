"""Checkpoints: one safetensors file with the tensors, and JSON beside them in its header. No pickle anywhere.

A file holds the model under `model.`, whatever else a run must keep under other prefixes, and the metadata that
rebuilds the model: its configuration, the normalization of its images and the image size it was trained at.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError, first_sentence, printable
from .model import SemiMoE
from .published import export_published, import_published
from .validation import check_types, shown

__all__ = ["Checkpoint", "Preprocessing", "export_published", "import_published", "load", "read", "save"]

FORMAT = 1
METADATA_KEY = "semimoe_fast"
ARGUMENTS = {  # of SemiMoE
    "in_channels": int,
    "num_classes": int,
    "width": int,
    "expert_tasks": tuple[Literal["mask", "sdf", "boundary"], ...],
}
MOST_PIXELS = 16384  # a side of an image, larger than any that a network of this kind fits into memory for
REMEDY = "take a checkpoint that this package wrote, undamaged"


class Checkpoint(NamedTuple):
    model: SemiMoE  # in eval mode
    metadata: dict[str, Any]  # what `save` was given, and "model": the arguments of SemiMoE
    state: dict[str, Tensor]  # the tensors beside the model


Channels = tuple[float, float, float]


class Preprocessing(NamedTuple):
    """What a model expects of its images, and the targets it learned."""

    image_size: int  # side in pixels
    mean: Channels  # images in [0, 1]
    std: Channels
    ring_radius: float = 2.0  # in pixels

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any]) -> Preprocessing:
        """From the metadata of a training run's checkpoint. Raises UserError where they hold none that can be used."""
        values = metadata.get("preprocessing")
        if values is None:
            raise UserError(f"{path}: holds no image size and statistics; take a checkpoint of a training run")
        check_types(path, "preprocessing", values, get_type_hints(cls), REMEDY)
        if not 1 <= values["image_size"] <= MOST_PIXELS:
            raise UserError(
                f"{path}: image_size of preprocessing is {values['image_size']}, not from 1 to {MOST_PIXELS}; {REMEDY}"
            )
        if min(values["std"]) <= 0 or values["ring_radius"] < 0:
            raise UserError(f"{path}: std or ring_radius of preprocessing is {shown(values)}, not positive; {REMEDY}")
        return cls(values["image_size"], tuple(values["mean"]), tuple(values["std"]), values["ring_radius"])


def save(
    path: str | Path,
    model: SemiMoE,
    metadata: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint so that `path` holds, at any moment, the old file or the new one, whole and on the disk.

    metadata must be JSON; state holds further tensors (optimizers, random states), on any device. Raises ValueError
    where they use the names kept for the model.
    """
    metadata, state = dict(metadata or {}), dict(state or {})
    taken = [name for name in metadata if name in ("format", "model")] + [k for k in state if k.startswith("model.")]
    if taken:
        raise ValueError(f"{taken[0]!r} is a name that checkpoints keep for the model itself: choose another")
    arguments = {
        "in_channels": model.in_channels,
        "num_classes": model.num_classes,
        "width": model.width,
        "expert_tasks": list(model.expert_tasks),
    }
    header = {"format": FORMAT, "model": arguments, **metadata}
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()} | state
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(Path(path), lambda part: save_file(tensors, part, {METADATA_KEY: json.dumps(header)}))


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its model. Raises UserError where the file is missing, damaged or another's."""
    metadata, tensors = read(path, device)
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    arguments = _checked_arguments(Path(path), metadata.get("model"), weights)
    with torch.device("meta"):  # nothing to initialize, no random number drawn
        model = SemiMoE(**arguments)
    for key, expected in model.state_dict().items():
        if key in weights and weights[key].dtype != expected.dtype:
            raise UserError(f"{path}: {key} is {weights[key].dtype}, not {expected.dtype}; {REMEDY}")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: {_misfit(arguments)}; {REMEDY}") from error
    state = {key: value for key, value in tensors.items() if not key.startswith("model.")}
    return Checkpoint(model.to(memory_format=torch.channels_last).eval(), metadata, state)


def read(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and all tensors of a checkpoint, without building the model. Raises UserError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the best.safetensors or last.safetensors of a run folder")
    try:
        with path.open("rb") as opened, safe_open(_utf8(path, opened), framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
            if header is None:
                raise UserError(f"{path}: a safetensors file, but not a checkpoint of semimoe_fast; {REMEDY}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, AttributeError) as error:  # the last: a dtype that this torch does not have
        raise UserError(
            f"{path}: not a readable checkpoint ({first_sentence(error)}); it is damaged, or another kind of file"
        ) from error
    try:
        metadata = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is not JSON ({first_sentence(error)}); {REMEDY}") from error
    check_types(path, "its metadata", metadata, {"format": int}, REMEDY)
    if metadata["format"] != FORMAT:
        raise UserError(f"{path}: has checkpoint format {metadata['format']}, this version reads format {FORMAT}")
    return metadata, tensors


def _utf8(path: Path, opened: BinaryIO) -> str:
    """A path to an open file that safe_open takes, which wants UTF-8."""
    return str(path) if printable(str(path)) == str(path) else f"/proc/self/fd/{opened.fileno()}"


def _checked_arguments(path: Path, arguments: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of SemiMoE that a file names, once its weights show that the model is not larger than the file."""
    check_types(path, "model", arguments, ARGUMENTS, REMEDY)
    if unknown := arguments.keys() - ARGUMENTS.keys():
        raise UserError(f"{path}: model has {min(unknown)!r}, which is no argument of this version; {REMEDY}")
    width, channels, tasks = (arguments[name] for name in ("width", "in_channels", "expert_tasks"))
    if not tasks:
        raise UserError(f"{path}: expert_tasks of model is empty; {REMEDY}")
    rows = {"mask": arguments["num_classes"], "sdf": 1, "boundary": 2}
    shapes = {f"experts.{e}.head.weight": (rows[task], width, 1, 1) for e, task in enumerate(tasks)}
    shapes["experts.0.encoder.0.0.weight"] = (width, channels, 3, 3)
    if not all(key in weights and tuple(weights[key].shape) == shape and min(shape) for key, shape in shapes.items()):
        raise UserError(f"{path}: {_misfit(arguments)}; {REMEDY}")
    return arguments


def _misfit(arguments: dict[str, Any]) -> str:
    return f"the weights do not fit its own configuration {shown(arguments)}"


def write_atomically(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Call write(temporary path), sync it and move it over `path`: a crash leaves the old file or the new one.

    Of a shared path several processes may write the same content at once, each to a temporary path of its own. For
    others that is always the same one, so that what a killed process left of it goes with the next.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part" if shared else f".{path.name}.part")
    try:
        part.touch()
        permissions = part.stat().st_mode  # what the umask says, which not every writer heeds
        write(part)
        part.chmod(permissions)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
