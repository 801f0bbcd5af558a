"""How fast a run is and how much memory it takes, in numbers that machines can be compared by."""

from __future__ import annotations

import functools
import resource
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..model import SemiMoE


class Stopwatch:
    """The time of an epoch's steps, without the first steps of a run, which choose algorithms, compile and capture.

    The warm-up may take several epochs. The device is waited for when it has warmed up and at the end of an epoch.
    """

    def __init__(self, device: torch.device, warm_up_steps: int) -> None:
        self.device, self.warm_up_steps = device, warm_up_steps
        self.warm_up_seconds = 0.0  # of the steps alone, not of validation between them
        self.start()

    def start(self) -> None:
        """An epoch begins."""
        self.steps, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def tick(self) -> None:
        """A step was issued."""
        if not self.warm_up_steps:
            self.steps += 1
            return
        self.warm_up_steps -= 1
        if not self.warm_up_steps:
            self.warm_up_seconds += self._elapsed()
            self.start()

    def stop(self) -> None:
        """The last step of the epoch was issued."""
        if self.warm_up_steps:
            self.warm_up_seconds += self._elapsed()
        else:
            self.seconds = self._elapsed()

    def seconds_per_step(self) -> float | None:
        """Mean over the steps of the epoch just stopped that came after the warm-up; None if there were none."""
        return self.seconds / self.steps if self.steps else None

    def _elapsed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started


@functools.cache
def flops_per_step(width: int, image_size: int, images: int) -> int:
    """Floating-point operations of a training step's U-Nets, forward and backward: a multiply and an add are two.

    width: channels of the first level; image_size: side in pixels; images: of the labeled and the unlabeled batch
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
