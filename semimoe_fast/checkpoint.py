"""Checkpoints: safetensors files whose header holds metadata as JSON. No pickle is read or written.

The names of the model's tensors start with `model.`; a training run adds tensors with other prefixes. The metadata
hold what rebuilds the model: the arguments of SemiMoE, the normalization of the images and the image size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError, first_sentence, printable, warn
from .files import write_atomically
from .model import SemiMoE
from .published import export_published, import_published
from .validation import check_types, shown

__all__ = ["Checkpoint", "Preprocessing", "export_published", "import_published", "load", "read", "save"]

FORMAT = 1
METADATA_KEY = "semimoe_fast"
ARGUMENTS = {  # arguments of SemiMoE
    "in_channels": int,
    "num_classes": int,
    "width": int,
    "expert_tasks": tuple[Literal["mask", "sdf", "boundary"], ...],
}
Sampling = Literal["resize", "crops"]
MOST_PIXELS = 16384  # limit of the side of an image; a network on larger images fits into no memory
LEAST_STD = 1e-4  # of pixels in [0, 1]; that of images of one color is stored as 1/255
REMEDY = "take a checkpoint that this package wrote, undamaged"


class Checkpoint(NamedTuple):
    model: SemiMoE  # in eval mode
    metadata: dict[str, Any]  # the metadata given to `save`, plus "format" and "model", the arguments of SemiMoE
    state: dict[str, Tensor]  # all tensors that are not of the model


Channels = tuple[float, float, float]


class Preprocessing(NamedTuple):
    """Size and normalization of a model's images, and how its boundary targets are made."""

    image_size: int  # side in pixels
    mean: Channels  # of pixels in [0, 1]
    std: Channels
    ring_radius: float = 2.0  # in pixels
    instances: bool = False  # the masks are instance maps
    sampling: Sampling = "resize"  # of training images: whole ones as squares, or crops at their own scale or at mpp
    antialias: bool = False  # training images are shrunk with antialiasing
    scale: float | None = None  # pixels of the model per pixel of a training file, median of both sides
    mpp: float | None = None  # microns per pixel of the model's images, if the training files say so

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any]) -> Preprocessing:
        """Read them from the metadata of a training run's checkpoint. Raises UserError for missing or bad values."""
        values = metadata.get("preprocessing")
        if values is None:
            raise UserError(f"{path}: holds no image size and statistics; take a checkpoint of a training run")
        check_types(path, "preprocessing", values, get_type_hints(cls), REMEDY)
        size, std, ring_radius = values["image_size"], values["std"], values["ring_radius"]
        if not 1 <= size <= MOST_PIXELS:
            raise UserError(f"{path}: image_size of preprocessing is {size}, not from 1 to {MOST_PIXELS}; {REMEDY}")
        if not 0 <= min(values["mean"]) <= max(values["mean"]) <= 1:
            raise UserError(f"{path}: mean of preprocessing is {shown(values['mean'])}, not from 0 to 1; {REMEDY}")
        if not LEAST_STD <= min(std) <= max(std) <= 1:
            raise UserError(f"{path}: std of preprocessing is {shown(std)}, not from {LEAST_STD:g} to 1; {REMEDY}")
        if ring_radius < 0:
            raise UserError(f"{path}: ring_radius of preprocessing is {shown(ring_radius)}, not 0 or more; {REMEDY}")
        for name in ("scale", "mpp"):
            if (value := values[name]) is not None and not value > 0:
                raise UserError(f"{path}: {name} of preprocessing is {shown(value)}, not positive; {REMEDY}")
        fields = {name: values[name] for name in cls._fields}
        return cls(**fields | {"mean": tuple(values["mean"]), "std": tuple(std)})


def save(
    path: str | Path,
    model: SemiMoE,
    metadata: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically: after a crash `path` holds the complete old file or the complete new one.

    metadata: JSON values; state: further tensors (optimizers, random states) on any device. Raises ValueError if
    metadata use the names "format" or "model", or state uses names that start with "model.".
    """
    metadata, state = dict(metadata or {}), dict(state or {})
    taken = [name for name in metadata if name in ("format", "model")] + [k for k in state if k.startswith("model.")]
    if taken:
        raise ValueError(f"the name {taken[0]!r} is reserved for the model in checkpoints: choose another")
    arguments = {
        "in_channels": model.in_channels,
        "num_classes": model.num_classes,
        "width": model.width,
        "expert_tasks": list(model.expert_tasks),
    }
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()} | state
    write(Path(path), {"model": arguments, **metadata}, tensors)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write metadata (JSON values) and tensors, on any device, atomically into a file that `read` reads."""
    header = {"format": FORMAT, **metadata}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda part: _save_file(tensors, part, {METADATA_KEY: json.dumps(header)}))


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file, which hides the OSError of a full disk in a SafetensorError."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its model, in eval mode, channels-last, on the given device.

    Weights of other floating-point types are cast, with a warning. Raises UserError if the file is missing, damaged or
    not a checkpoint of this package.
    """
    metadata, tensors = read(path, device)
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    arguments = _checked_arguments(Path(path), metadata.get("model"), weights)
    with torch.device("meta"):  # does not initialize weights and draws no random numbers
        model = SemiMoE(**arguments)
    weights = _cast(path, weights, {key: tensor.dtype for key, tensor in model.state_dict().items()})
    if (name := first_non_finite(weights)) is not None:
        raise UserError(f"{path}: {name} has values that are not finite; take a checkpoint that has not diverged")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: {_mismatch(arguments)}; {REMEDY}") from error
    state = {key: value for key, value in tensors.items() if not key.startswith("model.")}
    return Checkpoint(model.to(memory_format=torch.channels_last).eval(), metadata, state)


def _cast(path: str | Path, weights: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The weights in the dtypes of the model, with a warning if other floating-point types were cast."""
    cast = {}
    for key, dtype in dtypes.items():
        if key in weights and (found := weights[key].dtype) != dtype:
            if not (found.is_floating_point and dtype.is_floating_point):
                raise UserError(f"{path}: {key} is {found}, not {dtype}; {REMEDY}")
            cast[key] = weights[key].to(dtype)
    if cast:
        found, to = weights[next(iter(cast))].dtype, dtypes[next(iter(cast))]
        warn(f"{path}: its weights are {found} and are cast to {to}")
    return weights | cast


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor that has NaN or inf, or None. Waits for the device once."""
    checked = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not checked:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in checked.values()]).tolist()
    return next((name for name, is_finite in zip(checked, finite, strict=True) if not is_finite), None)


def read(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and all tensors of a checkpoint without building the model. Raises UserError as `load` does."""
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give the best.safetensors or last.safetensors of a run folder")
    try:
        with path.open("rb") as opened, safe_open(_utf8(path, opened), framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
            if header is None:
                raise UserError(f"{path}: a safetensors file, but not a checkpoint of semimoe_fast; {REMEDY}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except PermissionError as error:
        raise UserError(f"{path}: you may not read it; change its permissions, or give another checkpoint") from error
    except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: this torch lacks the dtype
        raise UserError(
            f"{path}: not a readable checkpoint ({first_sentence(error)}), damaged or another kind of file; give the "
            "best.safetensors or last.safetensors of a run folder"
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
    """A UTF-8 path to an open file, because safe_open takes no other paths."""
    return str(path) if printable(str(path)) == str(path) else f"/proc/self/fd/{opened.fileno()}"


def _checked_arguments(path: Path, arguments: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of SemiMoE in a file, checked against the shapes of its weights.

    The check keeps a file from making us build a model that is larger than the file.
    """
    check_types(path, "model", arguments, ARGUMENTS, REMEDY)
    if unknown := arguments.keys() - ARGUMENTS.keys():
        raise UserError(f"{path}: model has {min(unknown)!r}, which is no argument of this version; {REMEDY}")
    if (classes := arguments["num_classes"]) < 2:
        raise UserError(f"{path}: num_classes of model is {shown(classes)}, not 2 or more; {REMEDY}")
    width, channels, tasks = (arguments[name] for name in ("width", "in_channels", "expert_tasks"))
    if not tasks:
        raise UserError(f"{path}: expert_tasks of model is empty; {REMEDY}")
    rows = {"mask": classes, "sdf": 1, "boundary": 2}
    shapes = {f"experts.{e}.head.weight": (rows[task], width, 1, 1) for e, task in enumerate(tasks)}
    shapes["experts.0.encoder.0.0.weight"] = (width, channels, 3, 3)
    if not all(key in weights and tuple(weights[key].shape) == shape and min(shape) for key, shape in shapes.items()):
        raise UserError(f"{path}: {_mismatch(arguments)}; {REMEDY}")
    return arguments


def _mismatch(arguments: dict[str, Any]) -> str:
    return f"the weights do not fit its own configuration {shown(arguments)}"
