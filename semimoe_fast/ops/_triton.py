"""Whether the Triton kernels of semimoe_fast.kernels can run here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

OLDEST = (8, 0)  # Ampere: bfloat16 and tf32 in the tensor cores


def why_unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve tensors on "cpu" or "cuda", in one line; None where it can."""
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels serve cuda tensors, not {device_type}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "Triton kernels run on a GPU, and on the CPU only in its interpreter (TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return None if device_type == "cpu" else _why_no_gpu()


def interprets() -> bool:
    """Whether Triton's interpreter shall serve CPU tensors even where the compiled module could.

    As the tests of the kernels ask: TRITON_INTERPRET=1 together with SEMIMOE_BACKEND=fused.
    """
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SEMIMOE_BACKEND") == "fused"


@functools.cache
def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < OLDEST:
            return f"{torch.cuda.get_device_name(index)} is older than sm {OLDEST[0]}{OLDEST[1]}"
    return None
