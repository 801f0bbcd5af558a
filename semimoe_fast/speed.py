"""How fast a run is and how much memory it takes, in numbers that machines can be compared by."""

from __future__ import annotations

import functools
import math
import resource
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .model import SemiMoE


class Stopwatch:
    """The time of steps, apart from those that warm up: they choose algorithms, compile, and capture graphs.

    The device is waited for twice: when it has warmed up, and when an epoch's time is read.
    """

    def __init__(self, device: torch.device, warm_up_steps: int) -> None:
        self.device, self.warm_up_steps = device, warm_up_steps
        self.warm_up_seconds = 0.0
        self.start()

    def start(self) -> None:
        """An epoch begins."""
        self.steps, self.started = 0, time.perf_counter()

    def tick(self) -> None:
        """A step was issued."""
        self.steps += 1
        if self.warm_up_steps:
            self.warm_up_steps -= 1
            if not self.warm_up_steps:
                self.warm_up_seconds += self._elapsed()
                self.start()

    def seconds_per_step(self) -> float:
        """Mean over the steps since the epoch began or the last one warmed up; infinite where there are none."""
        return self._elapsed() / self.steps if self.steps else math.inf

    def _elapsed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started


@functools.cache
def flops_per_step(width: int, image_size: int, images: int) -> int:
    """Floating-point operations of a training step's U-Nets, forward and backward: a multiply and an add are two.

    width: channels of the first level; image_size: side in pixels; images: of the labelled and the unlabelled batch
    together, which cost the same. Counted are the convolutions, with those of the experts' own heads, from the shapes
    alone: nothing is computed, and no random number is drawn. Gates and losses, far below a hundredth, are not.
    """
    with torch.device("meta"):
        experts = SemiMoE(width=width).experts
        batch = torch.empty(images, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        for expert in experts:
            _, own = expert(batch)
            own.sum().backward()
    return counter.get_total_flops()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of tensors on a CUDA device; else of the process, resident, as Linux counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
