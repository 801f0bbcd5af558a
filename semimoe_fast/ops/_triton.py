"""Whether the Triton kernels of semimoe_fast.kernels can run here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch.torch_version import TorchVersion

from ._backend import forced_backend

OLDEST = (8, 0)  # Ampere: bfloat16 and tf32 in the tensor cores


def why_unavailable(device_type: str) -> str | None:
    """The reason in one line why Triton cannot serve "cpu" or "cuda" tensors; None if it can."""
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels serve cuda tensors, not {device_type}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "Triton kernels need a GPU (TRITON_INTERPRET=1 runs them on the CPU for tests)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return _why_no_interpreter() if device_type == "cpu" else _why_no_gpu()


def interprets() -> bool:
    """Whether Triton's interpreter computes CPU tensors although the compiled module could.

    The tests of the kernels ask for it with TRITON_INTERPRET=1 and the forced backend "fused".
    """
    return os.environ.get("TRITON_INTERPRET") == "1" and forced_backend() == "fused"


@functools.cache
def _why_no_interpreter() -> str | None:
    """Triton 3.6 makes an int of an array with one element, which NumPy refuses from 2.4 on."""
    import numpy
    import triton

    if TorchVersion(triton.__version__) >= (3, 7) or TorchVersion(numpy.__version__) < (2, 4):
        return None
    names = f"Triton {triton.__version__} fails beside NumPy {numpy.__version__}"
    return f"the interpreter of {names}: run `pip install 'numpy<2.4'`"


@functools.cache
def _why_no_gpu() -> str | None:
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < OLDEST:
            name, oldest = torch.cuda.get_device_name(index), "{}{}".format(*OLDEST)
            return f"{name} is older than sm {oldest}: leave it out of CUDA_VISIBLE_DEVICES, if there are others"
    return None
