"""Choose the backend of every operation.

Each operation has up to three implementations: `reference` (obvious), `portable` (fast plain PyTorch) and `fused`
(compiled module or Triton). The default is the fused one if it can serve, else the portable one. SEMIMOE_BACKEND or
`backend(...)` forces one of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import _native, _triton, adaptive, batch_norm, distance, fold_upsampling, gate, objective, portable, reference
from ._backend import BACKENDS, BackendError, backend, forced_backend
from ._watched import transformed

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "BackendError",
    "backend",
    "choose",
    "forced_backend",
    "implementation",
    "why_not_fused",
]

logger = logging.getLogger("semimoe_fast")


class Fused(NamedTuple):
    """A fused implementation, and the module (`_native` or `_triton`) that runs it on each device."""

    function: Callable[..., Any]
    cpu: ModuleType
    cuda: ModuleType


FUSED = {
    "squared_distance": Fused(distance.squared_distance, cpu=_native, cuda=_native),
    "distance_targets": Fused(distance.distance_targets, cpu=_native, cuda=_native),
    "multi_gate": Fused(gate.multi_gate, cpu=_triton, cuda=_triton),
    "pseudo_labels": Fused(gate.pseudo_labels, cpu=_triton, cuda=_triton),
    "project_experts": Fused(gate.project_experts, cpu=_triton, cuda=_triton),
    "mix_projections": Fused(gate.mix_projections, cpu=_triton, cuda=_triton),
    "label_projections": Fused(gate.label_projections, cpu=_triton, cuda=_triton),
    "objective_terms": Fused(objective.objective_terms, cpu=_native, cuda=_triton),
    "joint_objective_terms": Fused(objective.joint_objective_terms, cpu=_native, cuda=_triton),
    "adaptive_loss": Fused(adaptive.adaptive_loss, cpu=_triton, cuda=_triton),
    "batch_norm_relu": Fused(batch_norm.batch_norm_relu, cpu=_native, cuda=_triton),
    "fold_upsampling": Fused(fold_upsampling.fold_upsampling, cpu=_triton, cuda=_triton),
}
OPERATIONS = (*FUSED, "squared_dice_loss", "soft_dice_loss", "tanh_mse_loss")

WITHOUT_DERIVATIVE = ("squared_distance", "distance_targets")


def implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes an operation on a device. Raises BackendError as `choose` does.

    Under torch.func and in forward mode that is the reference of what has a derivative, because the others are custom
    ops, of which PyTorch would take zeros for the tangents.
    """
    if operation not in WITHOUT_DERIVATIVE and not torch.compiler.is_compiling() and transformed():
        return getattr(reference, operation)
    name = _chosen(operation, device.type, forced_backend())
    if name == "fused":
        return FUSED[operation].function
    return getattr(reference if name == "reference" else portable, operation)


def choose(operation: str, device_type: str, forced: str | None = None) -> tuple[str, str]:
    """The backend of an operation on "cpu" or "cuda" tensors, and the reason in one line.

    forced: the backend that the caller asks for. Raises BackendError if it does not exist or cannot serve.
    """
    obstacle = why_not_fused(operation, device_type)
    if forced is None:
        if obstacle is None and device_type == "cpu" and _engine(operation, device_type) is _triton:
            obstacle = "Triton's interpreter is for tests"
        return ("portable", obstacle) if obstacle else ("fused", "the fastest available")
    if forced not in BACKENDS:
        raise BackendError(f"SEMIMOE_BACKEND={forced!r}: choose one of {', '.join(BACKENDS)}, or unset it")
    if forced == "fused" and obstacle:
        raise BackendError(
            f"the fused backend cannot serve {operation} on {device_type}: {obstacle}; choose another backend"
        )
    return forced, "SEMIMOE_BACKEND or backend(...) asks for it"


def why_not_fused(operation: str, device_type: str) -> str | None:
    """The reason in one line why the fused backend cannot serve an operation on a device; None if it can."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
    if operation not in FUSED:
        return "it has no fused kernel yet"
    return _engine(operation, device_type).why_unavailable(device_type)


def _engine(operation: str, device_type: str) -> ModuleType:
    """The module that runs a fused operation on a device: `_native` or `_triton`."""
    fused = FUSED[operation]
    if device_type == "cpu" and not (fused.cuda is _triton and _triton.interprets()):
        return fused.cpu
    return fused.cuda


@torch.compiler.assume_constant_result  # torch.compile cannot trace the log and the cache
def _chosen(operation: str, device_type: str, forced: str | None) -> str:
    return _choose_and_log(operation, device_type, forced)


@functools.cache  # so that a fallback is logged once
def _choose_and_log(operation: str, device_type: str, forced: str | None) -> str:
    name, reason = choose(operation, device_type, forced)
    on_cpu = operation in FUSED and FUSED[operation].cpu is _native
    fused_expected = device_type == "cuda" or (device_type == "cpu" and on_cpu)
    if forced is None and name == "portable" and fused_expected:
        logger.warning("%s on %s falls back to the portable backend: %s", operation, device_type, reason)
    return name
