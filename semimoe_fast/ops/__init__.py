"""Choice of backend for every operation; beside it, the custom ops through which torch.compile sees the fused ones.

Three backends stand behind each public name: `reference` (obvious), `portable` (fast plain PyTorch) and `fused`
(native or Triton). The environment variable SEMIMOE_BACKEND forces one, and fails where it cannot serve.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..errors import UserError
from . import _native, _triton, adaptive, distance, gate, objective, portable, reference

logger = logging.getLogger("semimoe_fast")

BACKENDS = ("reference", "portable", "fused")
OPERATIONS = (
    "squared_distance",
    "distance_targets",
    "multi_gate",
    "pseudo_labels",
    "project_experts",
    "mix_projections",
    "label_projections",
    "squared_dice_loss",
    "soft_dice_loss",
    "tanh_mse_loss",
    "objective_terms",
    "joint_objective_terms",
    "adaptive_loss",
)


class BackendError(UserError, RuntimeError):
    """SEMIMOE_BACKEND asks for a backend that is unknown or cannot serve here."""


NATIVE: dict[str, Callable[..., Any]] = {
    "squared_distance": distance.squared_distance,
    "distance_targets": distance.distance_targets,
}
TRITON: dict[str, Callable[..., Any]] = {
    "multi_gate": gate.multi_gate,
    "pseudo_labels": gate.pseudo_labels,
    "project_experts": gate.project_experts,
    "mix_projections": gate.mix_projections,
    "label_projections": gate.label_projections,
    "objective_terms": objective.objective_terms,
    "joint_objective_terms": objective.joint_objective_terms,
    "adaptive_loss": adaptive.adaptive_loss,
}
NATIVE_ON_CPU = ("objective_terms", "joint_objective_terms")  # by Triton on a GPU; see also _triton.interprets
FUSED = NATIVE | TRITON


def implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes an operation on a device, as `choose` decides."""
    backend = _chosen(operation, device.type, os.environ.get("SEMIMOE_BACKEND"))
    if backend == "fused":
        return FUSED[operation]
    return getattr(reference if backend == "reference" else portable, operation)


def choose(operation: str, device_type: str, forced: str | None = None) -> tuple[str, str]:
    """Backend for an operation on "cpu" or "cuda" tensors, and the reason in one line; `forced` is SEMIMOE_BACKEND.

    Raises BackendError where the forced backend is unknown or cannot serve.
    """
    missing = why_not_fused(operation, device_type)
    if forced is None:
        if missing is None and device_type == "cpu" and _engine(operation, device_type) is _triton:
            missing = "Triton's interpreter is for tests"
        return ("portable", missing) if missing else ("fused", "the fastest available")
    if forced not in BACKENDS:
        raise BackendError(f"SEMIMOE_BACKEND={forced!r}: choose one of {', '.join(BACKENDS)}, or unset it")
    if forced == "fused" and missing:
        raise BackendError(f"SEMIMOE_BACKEND=fused cannot serve {operation} on {device_type}: {missing}")
    return forced, f"SEMIMOE_BACKEND={forced}"


def why_not_fused(operation: str, device_type: str) -> str | None:
    """Why an operation has no fused implementation on a device, or None where it has one."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
    if operation not in FUSED:
        return "no fused kernel is written for it yet"
    return _engine(operation, device_type).why_unavailable(device_type)


def _engine(operation: str, device_type: str) -> ModuleType:
    """Who computes a fused operation on a device: `_native` or `_triton`."""
    native_here = device_type == "cpu" and operation in NATIVE_ON_CPU and not _triton.interprets()
    return _native if operation in NATIVE or native_here else _triton


@torch.compiler.assume_constant_result  # so that a compiled caller traces past the log and the cache
def _chosen(operation: str, device_type: str, forced: str | None) -> str:
    return _choose_and_say(operation, device_type, forced)


@functools.cache
def _choose_and_say(operation: str, device_type: str, forced: str | None) -> str:
    """`choose`, and a line in the log the first time that it falls back."""
    backend, reason = choose(operation, device_type, forced)
    if forced is None and backend == "portable" and (device_type != "cpu" or operation in (*NATIVE, *NATIVE_ON_CPU)):
        logger.warning("%s on %s falls back to the portable backend: %s", operation, device_type, reason)
    return backend
