"""Import and export of checkpoints in the layout of the published code (its four state dicts).

In the published networks every convolution before BN has a bias. Ours have none: the import subtracts the bias from
BN's running mean, which does not change any output, and the export writes biases of zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, first_sentence
from .model import LEVELS, SemiMoE

EXPERT_PARTS = ("segment_model", "sdf_model", "boundary_model")
GATING_PART = "gating_model"
PARTS = (*EXPERT_PARTS, GATING_PART)
HEAD_NAMES = ("mask_head", "sdf_head", "bnd_head")
FOLLOWING_NORM = {"conv.0": "conv.1", "conv.3": "conv.4", "up.1": "up.2"}

StateDict = Mapping[str, Tensor]


def import_published(source: str | Path | Mapping[str, StateDict]) -> SemiMoE:
    """A SemiMoE in eval mode with the weights of a published checkpoint.

    source: a torch file, or a dict of the state dicts segment_model, sdf_model, boundary_model and gating_model, whose
    keys may start with `module.`. Files are read without executing pickled code. Raises UserError if the file cannot
    be read, or if parts, keys or shapes differ from those of a published checkpoint.
    """
    name = "the dict of state dicts" if isinstance(source, Mapping) else str(source)
    parts = source if isinstance(source, Mapping) else _read_torch_file(Path(source))
    missing = [part for part in PARTS if not isinstance(parts.get(part), Mapping)]
    if missing:
        raise UserError(f"{name}: has no {missing[0]}; a published checkpoint has {', '.join(PARTS)}")
    parts = {part: _tensors(name, part, parts[part]) for part in PARTS}
    try:
        stem, head = (parts["segment_model"][key] for key in ("Conv1.conv.0.weight", "Conv_1x1.weight"))
        if stem.ndim != 4 or head.ndim != 4 or 0 in stem.shape + head.shape:
            raise ValueError(f"the first and the last weight are {tuple(stem.shape)} and {tuple(head.shape)}")
        with torch.device("meta"):  # does not initialize weights and draws no random numbers
            model = SemiMoE(in_channels=stem.shape[1], num_classes=head.shape[0], width=stem.shape[0])
        for part, expert in zip(EXPERT_PARTS, model.experts, strict=True):
            expert.load_state_dict(_import_expert(parts[part]), assign=True)
        gating = {rename_gating(key): value.clone() for key, value in parts[GATING_PART].items()}
        model.gating.load_state_dict(gating, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: is not a published Semi-MoE checkpoint ({first_sentence(error)}); "
            "give a checkpoint that the published code wrote"
        ) from error
    return model.eval()


def _tensors(name: str, part: str, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict with the prefix `module.` removed. Raises UserError unless it maps strings to tensors."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = f"{type(key).__name__} -> {type(value).__name__}"
            raise UserError(f"{name}: {part} holds {key!r} ({kind}), not a named tensor; give the four state dicts")
    return {key.removeprefix("module."): value for key, value in state.items()}


def export_published(model: SemiMoE) -> dict[str, dict[str, Tensor]]:
    """The model as the four state dicts of the published code, which `import_published` reads.

    Raises ValueError unless the experts are mask, sdf and boundary, in this order.
    """
    if model.expert_tasks != ("mask", "sdf", "boundary"):
        raise ValueError(f"the published layout has experts for mask, sdf, boundary; this model: {model.expert_tasks}")
    experts = zip(EXPERT_PARTS, model.experts, strict=True)
    parts = {part: _export_expert(expert.state_dict()) for part, expert in experts}
    gating = {rename_gating(key): key for key in _published_gating_keys(model)}
    parts[GATING_PART] = {gating[key]: value.clone() for key, value in model.gating.state_dict().items()}
    return parts


def _read_torch_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint that the published code wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file the unpickler of torch.load raises almost any exception
        raise UserError(f"{path}: not a torch file of plain tensors ({first_sentence(error)})") from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}; give the dict of four state dicts that the published code wrote"
        )
    return dict(content)


def _import_expert(state: StateDict) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in state.items()}
    for key in [key for key in state if key.endswith(".bias")]:
        module = key.removesuffix(".bias")
        block, _, layer = module.partition(".")
        if layer in FOLLOWING_NORM:
            mean = f"{block}.{FOLLOWING_NORM[layer]}.running_mean"
            state[mean] = state[mean] - state.pop(key)
    return {rename_expert(key): value for key, value in state.items()}


def _export_expert(state: StateDict) -> dict[str, Tensor]:
    """The state dict with published keys in published order; each convolution before BN gets a bias of zeros."""
    exported = {}
    for key, value in state.items():
        exported[published := published_expert_key(key)] = value.clone()
        module = published.removesuffix(".weight")
        if module != published and module.partition(".")[2] in FOLLOWING_NORM:
            exported[f"{module}.bias"] = torch.zeros(value.shape[0], dtype=value.dtype)
    return exported


def rename_expert(key: str) -> str:
    """Published key of an expert -> ours."""
    key = re.sub(r"^Conv(\d)\.conv", lambda m: f"encoder.{int(m[1]) - 1}", key)
    key = re.sub(r"^Up(\d)\.up", lambda m: f"upsample.{LEVELS - int(m[1])}", key)
    key = re.sub(r"^Up_conv(\d)\.conv", lambda m: f"decoder.{LEVELS - int(m[1])}", key)
    return key.replace("Conv_1x1", "head")


def published_expert_key(key: str) -> str:
    """Our key of an expert -> the published one."""
    key = re.sub(r"^encoder\.(\d)", lambda m: f"Conv{int(m[1]) + 1}.conv", key)
    key = re.sub(r"^upsample\.(\d)", lambda m: f"Up{LEVELS - int(m[1])}.up", key)
    key = re.sub(r"^decoder\.(\d)", lambda m: f"Up_conv{LEVELS - int(m[1])}.conv", key)
    return key.replace("head", "Conv_1x1")


def rename_gating(key: str) -> str:
    """Published key of the gating module -> ours."""
    key = re.sub(r"^gating(\d)", lambda m: f"gates.{int(m[1]) - 1}", key)
    return re.sub(rf"^({'|'.join(HEAD_NAMES)})\.conv1", lambda m: f"heads.{HEAD_NAMES.index(m[1])}", key)


def _published_gating_keys(model: SemiMoE) -> list[str]:
    gates = [f"gating{k + 1}.{name}" for k, gate in enumerate(model.gating.gates) for name in gate.state_dict()]
    return gates + [f"{head}.conv1.{name}" for head in HEAD_NAMES for name in ("weight", "bias")]
