"""A lock so that only one process writes into a run folder."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ..locks import lock

LOCK_FILE = ".lock"


class FolderLock:
    """Context that locks at most one run folder until the `with` block or the process ends.

    The lock is a POSIX flock on FOLDER/.lock, which the system releases even if the process is killed. The file is
    never removed, because another process may have opened it in order to lock it.
    """

    def __enter__(self) -> FolderLock:
        self.held = ExitStack()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held.close()

    def take(self, folder: Path) -> None:
        """Lock an existing folder; on a file system without locks, only warn.

        Raises UserError if another process holds the lock, OSError if the lock file cannot be opened.
        """
        # O_NONBLOCK: opening a named pipe fails and does not wait for a reader
        file = os.open(folder / LOCK_FILE, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
        self.held.callback(os.close, file)
        lock(
            file,
            folder,
            f"{folder}: another process is training in this folder; wait until it ends, stop it, or train in another "
            "folder (--out)",
            "make sure that no other process trains in it",
        )
