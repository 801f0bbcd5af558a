"""Triton kernels, one file per operation: jit functions and the launchers that check, allocate and launch.

Installed as semimoe_fast.kernels. No autograd, no choice of backend, no policy: those stand in semimoe_fast.ops. Triton
is optional: this module imports without it, and says why it cannot serve.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def why_unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve tensors on "cpu" or "cuda", in one line; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: a CUDA build of torch brings it"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return f"Triton compiles for GPUs; {device_type} tensors are served by its interpreter (TRITON_INTERPRET=1)"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
