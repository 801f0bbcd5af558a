"""Files that one process at a time holds."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

from .errors import UserError, warn


def lock(file: int, place: Path, held: str, otherwise: str) -> None:
    """Lock the open file of a place by a POSIX flock, which the system releases even if the process is killed.

    Raises UserError with the line `held` if another process holds it. On a file system without locks it only warns,
    with the remedy `otherwise`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(held) from None
        warn(f"{place} cannot be locked ({error.strerror}); {otherwise}")
