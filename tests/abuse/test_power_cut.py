"""A power cut: what was written and not synced is gone. Each run goes on from there, bitwise.

The model: a child copies every file that it syncs, at its os.fsync, into a journal, under the inode of the file. Before
its n-th os.fsync or os.replace it kills itself. Then every file of the run and of the cache is set back to the copy of
its last os.fsync; a file that was never synced becomes empty, or, in every other case, as long as it was with zeros
alone. Renames and new names are kept, the worst that common file systems do to a file renamed before it was synced.
The child keeps each synced file open, so that no other file gets its inode.
"""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from pathlib import Path

from runs import finish, require_same, spread, start


class Journal:
    """In a child: copies of files as they were at their last os.fsync, and a kill before the n-th event."""

    def __init__(self, folder: Path, events: int | None = None) -> None:
        self.folder, self.left, self.events = folder, events, 0

    def watch(self, parent: Path) -> None:
        """Take what is below `parent` as synced, and begin."""
        for path in parent.rglob("*"):
            if path.is_file():
                self.copy(os.open(path, os.O_RDONLY))
        fsync, replace = os.fsync, os.replace

        def synced(file: int) -> None:
            self.event()
            fsync(file)
            if stat.S_ISREG(os.fstat(file).st_mode):
                self.copy(os.dup(file))

        def replaced(source: object, target: object) -> None:
            self.event()
            replace(source, target)

        os.fsync, os.replace = synced, replaced

    def event(self) -> None:
        self.events += 1
        (self.folder / "events").write_text(str(self.events))
        if self.events == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def copy(self, file: int) -> None:
        """Keep a file, which stays open, under its inode."""
        content = Path(f"/proc/self/fd/{file}").read_bytes()
        (self.folder / str(os.fstat(file).st_ino)).write_bytes(content)

    def restore(self, parent: Path, zeros: bool) -> None:
        """Set the files below `parent` back to what was synced."""
        for path in parent.rglob("*"):
            if path.is_file():
                copy = self.folder / str(path.stat().st_ino)
                unsynced = bytes(path.stat().st_size) if zeros else b""
                path.write_bytes(copy.read_bytes() if copy.exists() else unsynced)


def test_power_cut(attempt, uninterrupted, everything: bool, tmp_path: Path) -> None:
    def cut(parent: Path, number: int, event: int | None) -> int:
        """Start or resume a run and cut the power before an event; the number of events."""
        journal = Journal(Path(tempfile.mkdtemp(dir=tmp_path)), event)
        (child,) = start(uninterrupted.config, parent / "run", before=lambda: journal.watch(parent))
        child.wait()
        journal.restore(parent, zeros=number % 2 == 1)
        return int((journal.folder / "events").read_text())

    def case(name: str, number: int, *events: int | None) -> None:
        for event in events:
            cut(folder(name), number, event)
        finish(uninterrupted.config, folder(name) / "run")
        require_same(folder(name) / "run", uninterrupted.folder)

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    title, count = "power cut and resume", cut(folder("counted"), 0, None)
    for n in spread(count + 1, count + 1 if everything else 8):
        attempt(title, f"before event {n}", case, f"once {n}", n, n or None)  # event None: after the run
        if n % 2:
            attempt(title, f"before event {n}, and again", case, f"twice {n}", n, n, 1 + n % 7)
