"""The memory that a training step needs at least: a run that cannot fit stops before it reads images."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..device import in_bf16
from ..errors import UserError
from ..model import SemiMoE
from .config import TrainConfig

# Bytes that the forward pass keeps, per image, pixel and channel of --width; `benchmarks.memory` counts them.
KEPT = {"fp32": 260, "fp32 recompute": 137, "bf16": 132, "bf16 recompute": 70}
GIB = 2**30
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def require_memory(config: TrainConfig, device: torch.device, processes: int) -> None:
    """Raise UserError if a step needs more memory than the device has altogether."""
    needed, there = least_bytes(config, device, processes), total_bytes(device)
    if needed > there:
        where = device if device.type == "cuda" else "this machine"
        raise UserError(
            f"--width {config.width}, --image-size {config.image_size} and {_images(config, processes)} images at once "
            f"need at least {needed / GIB:,.0f} GiB, and {where} has {there / GIB:,.0f}; make one of them smaller, or "
            f"use --accumulate{'' if _recomputes(config) else ' or --recompute'}"
        )


def least_bytes(config: TrainConfig, device: torch.device, processes: int) -> int:
    """Bytes of the weights and their copies, and of what the forward pass of one part of a batch keeps."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in SemiMoE(width=config.width).parameters())
    recompute = " recompute" if _recomputes(config) else ""
    kept = KEPT[("bf16" if in_bf16(config.precision, device) else "fp32") + recompute]
    copies = 3 + (config.optimizer == "adamw") + 2 * (config.ema is not None)  # gradients, moments, EMA and its sums
    return 4 * copies * weights + kept * _images(config, processes) * config.width * config.image_size**2


def _recomputes(config: TrainConfig) -> bool:
    return config.recompute or config.compile != "none"  # compilers recompute, too


def _images(config: TrainConfig, processes: int) -> int:
    """Images that one process takes at once."""
    return config.images_per_step // (processes * config.accumulate)


def total_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    return machine if limit == "max" else min(machine, int(limit))
