"""Where a run computes, and at which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from .errors import UserError

Precision = Literal["auto", "fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N". Raises UserError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device is {name!r}, but torch sees {count} CUDA devices; use --device cpu")
    return device


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where the precision asks for it; "auto" does on CUDA."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
