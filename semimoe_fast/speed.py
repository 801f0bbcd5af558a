"""How fast a run trains."""

from __future__ import annotations

import math
import time

import torch


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
