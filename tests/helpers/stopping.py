"""Interrupt training after a number of steps, as a user does by Ctrl-C."""

from __future__ import annotations

import signal

from semimoe_fast.training import interruption


class StopAfter(interruption.Interruption):
    """An interruption after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        self.received = signal.SIGINT if self.left <= 0 else 0
        return self.left <= 0
