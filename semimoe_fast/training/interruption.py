"""Signals that end a run after the step under way."""

from __future__ import annotations

import signal
from types import FrameType

from .distributed import World


class Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the step under way can finish; a second one ends the process.

    Called after every step, it tells whether any rank got one, on all of them at the same step. A second one does not
    end them: torchrun hands on what reached them before, and ends them itself after half a minute.
    """

    def __init__(self, world: World) -> None:
        self.world, self.received = world, 0

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        agreed = self.world.max(self.received)
        if agreed:  # else leave it: a signal may have come meanwhile
            self.received = agreed
        return agreed != 0

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if self.world.size == 1:
            signal.signal(number, self.previous[number])
