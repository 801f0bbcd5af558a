"""SIGINT and SIGTERM stop a run after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from .distributed import World


class Interruption:
    """A context that records SIGINT and SIGTERM; the object, called after every step, says whether to stop.

    All ranks stop after the same step if any rank got a signal. In a run of one process, a second signal has its
    usual effect. With torchrun it is ignored, because torchrun forwards signals that the ranks may already have got;
    torchrun kills the ranks after 30 seconds. A signal that was ignored stays so, such as SIGINT in the background of
    a script.
    """

    def __init__(self, world: World) -> None:
        self.world, self.received = world, 0

    def __enter__(self) -> Interruption:
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        agreed = self.world.max(self.received)
        if agreed:  # if not, keep self.received: a signal may have arrived during max()
            self.received = agreed
        return agreed != 0

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name

    def _receive(self, number: int, _: FrameType | None) -> None:
        first, self.received = not self.received, number
        if self.world.size == 1:
            signal.signal(number, self.previous[number])
        if first and self.world.is_main:
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(2, f"\n{self.name}: a checkpoint follows the next step\n".encode())  # print is not reentrant
