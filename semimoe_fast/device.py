"""Device, precision and global torch settings of a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from .errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["none", "default", "max"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of malloc.h


def cuda_devices() -> int:
    """CUDA devices that PyTorch can use: none if the driver is too old, although PyTorch counts them then."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; auto takes CUDA if available. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= (count := cuda_devices()):
        raise UserError(f"--device is {name!r}, but torch can use {count} CUDA devices; use --device cpu")
    return device


def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether the networks run in bf16; "auto" means bf16 on CUDA and fp32 on the CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """A context with bf16 autocast if `in_bf16`, else one without autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device))


def configure(device: torch.device, precision: Precision, deterministic: bool) -> str:
    """Set torch's global switches for a run; return one line that describes the settings.

    cudnn.benchmark is on because input shapes are constant, and off for deterministic runs because the fastest
    algorithm may differ from run to run.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads this when it starts
        # warn_only: torch calls the backward of max pooling nondeterministic, but 2 x 2 windows do not overlap.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time
    configure_prediction(device, precision)
    bf16 = in_bf16(precision, device)
    settings = ["bf16 autocast" if bf16 else "fp32", "channels-last"]
    if device.type == "cpu":
        return ", ".join([f"CPU, threads: {torch.get_num_threads()}", *settings])
    torch.backends.cudnn.benchmark = not deterministic
    settings += [
        f"TF32 {'on' if bf16 else 'off'}",
        f"cudnn.benchmark {'off' if deterministic else 'on'}",
        *(["deterministic"] if deterministic else []),
    ]
    return ", ".join([torch.cuda.get_device_name(device), *settings])


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """A context without cudnn.benchmark, which tries all algorithms for every new shape: for batches of many shapes."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def configure_prediction(device: torch.device, precision: Precision) -> None:
    """Set torch's switches and, on a CPU, malloc for predictions. TF32 is on with bf16 only, so fp32 is full fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = in_bf16(precision, device)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next allocation, instead of returning it to the system.

    glibc maps memory anew for every large tensor, and the system fills it with zeros. Without this, that took a
    fifth of a step's time on the CPU (benchmarks/results/step.md), and takes time of predictions, too. The price is
    memory, for the life of the process: if tensors become larger and larger, holes between others may remain
    unused. Does nothing with other C libraries.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
