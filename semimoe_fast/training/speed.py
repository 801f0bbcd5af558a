"""Speed, floating-point operations and memory of a run."""

from __future__ import annotations

import functools
import resource
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import warn
from ..model import SemiMoE
from ..ops import backend
from .config import TrainConfig

CPU_FLOPS = 1e11  # float32 operations a second and thread, which convolutions rarely reach


class Stopwatch:
    """Mean time of the steps of an epoch, without the warm-up: the first steps of a run, which compile and capture.

    The warm-up may span several epochs. The stopwatch synchronizes the device after the warm-up and after every epoch.
    After the first step, in which cuDNN tries algorithms that need more, it starts the peak memory of a GPU anew.
    """

    def __init__(self, device: torch.device, warm_up_steps: int) -> None:
        self.device, self.warm_up_steps, self.first = device, warm_up_steps, True
        self.warm_up_seconds = 0.0  # time of the steps only, without validation
        self.start()

    def start(self) -> None:
        """Call at the start of an epoch."""
        self.steps, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def tick(self) -> None:
        """Call after every step."""
        if self.first and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.first = False
        if not self.warm_up_steps:
            self.steps += 1
            return
        self.warm_up_steps -= 1
        if not self.warm_up_steps:
            self.warm_up_seconds += self._elapsed()
            self.start()

    def stop(self) -> None:
        """Call after the last step of an epoch."""
        if self.warm_up_steps:
            self.warm_up_seconds += self._elapsed()
        else:
            self.seconds = self._elapsed()

    def seconds_per_step(self) -> float | None:
        """Mean over the steps of the last epoch after the warm-up; None if it had no such step."""
        return self.seconds / self.steps if self.steps else None

    def _elapsed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started


@functools.cache
def flops_per_step(width: int, image_size: int, images: int) -> int:
    """Floating-point operations of the U-Nets in a training step, forward and backward; a multiply-add counts as 2.

    width: channels of the first level. image_size: side in pixels. images: labeled and unlabeled images in a step.
    The count covers the convolutions of the experts and their heads. It omits gates and losses, which are far below
    1 %. It uses shapes only: it computes nothing and draws no random numbers.
    """
    with torch.device("meta"):
        experts = SemiMoE(width=width).experts
        batch = torch.empty(images, 3, image_size, image_size)
    with backend("portable"), FlopCounterMode(display=False) as counter:  # fused operations refuse meta tensors
        for expert in experts:
            _, own = expert(batch)
            own.sum().backward()
    return counter.get_total_flops()


def warn_if_long(config: TrainConfig, steps: int, device: torch.device, processes: int) -> None:
    """Warn of a run on a CPU that takes more than a day, at CPU_FLOPS on every thread."""
    if device.type == "cuda":
        return
    operations = steps * flops_per_step(config.width, config.image_size, config.images_per_step)
    days = operations / (CPU_FLOPS * torch.get_num_threads() * processes * 24 * 3600)
    if days > 1:
        warn(
            f"{steps} steps at --width {config.width} and --image-size {config.image_size} probably take more than "
            f"{days:.1f} days on this CPU; for a first look add {first_look(config)}"
        )


def first_look(config: TrainConfig) -> str:
    """Options for a run of minutes on a CPU."""
    options = "--width 8 --image-size 64 --epochs 20"
    options += "" if config.optimizer == "adamw" else " --lr 0.1"
    return options + ("" if config.schedule == "cosine" else " --decay-epochs 5") + " --warmup-epochs 2"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: of tensors on a CUDA device, or the resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
