"""Start processes, such as compilers, on a machine that is short of processes for a while."""

from __future__ import annotations

import subprocess
import time
from typing import Any


def run_patiently(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
    """subprocess.run, tried for a minute while fork fails with EAGAIN (BlockingIOError).

    fork fails that way while the machine or the container has as many processes as its limit allows.
    """
    for pause in (1, 2, 4, 8, 16, 32):
        try:
            return subprocess.run(*arguments, **options)
        except BlockingIOError:
            time.sleep(pause)
    return subprocess.run(*arguments, **options)
