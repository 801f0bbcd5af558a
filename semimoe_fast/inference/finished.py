"""Which images are predicted into a folder, so that the same call after an interruption goes on with the others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from ..errors import UserError, naming
from ..locks import lock

NAME = ".predict.jsonl"


class Finished:
    """The images that calls with the same settings have predicted, in a file in the folder of the outputs.

    The first line of the file holds the settings, JSON values. Every further line is an image: its name once it is
    started, so that its outputs are known to be of such a call; name, size in bytes and time of change once it is
    predicted. `forget` removes the file once all images are.

    A context manager: the file is locked until the block or the process ends (POSIX flock, which the system releases
    even if the process is killed), from the start if it exists, else from `begin`. So one process at a time predicts
    into a folder. Another one raises UserError.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / NAME
        if self.path.exists() and not self.path.is_file():  # a named pipe, for example
            raise UserError(f"{self.path} is not a file: remove it, or give another --out")
        self._first = json.dumps(settings, sort_keys=True)
        self._file = self._open() if self.path.is_file() else None
        lines = self._file.read().splitlines() if self._file else []
        self.resumed = lines[:1] == [self._first]  # such a call was interrupted
        finished = [line for line in lines[1:] if line.startswith("[")]
        self.others = 0 if self.resumed else len(finished)  # images of an interrupted call with other settings
        self._lines = set(lines[1:] if self.resumed else [])

    def begin(self) -> None:
        """Create the file, or empty that of a call with other settings."""
        if self._file is None:
            self._file = self._open()
        if not self.resumed:
            self._file.truncate(0)
            self._write(self._first)
        else:
            self._write("")  # ends a line that a full disk has cut off

    def __contains__(self, image: Path) -> bool:
        return image.exists() and state_of(image) in self._lines

    def has_started(self, image: Path) -> bool:
        """Whether the outputs of an image may be those of an interrupted call."""
        return json.dumps(image.name) in self._lines

    def start(self, image: Path) -> None:
        """Call it before the first output of an image is in place."""
        self._write(json.dumps(image.name))

    def add(self, state: str) -> None:
        """Call it when all outputs of an image are in place, with its state before it was read."""
        self._write(state)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def _open(self) -> TextIO:
        """The file, locked; on a file system without locks only a warning."""
        file = self.path.open("a+", errors="replace")
        try:
            lock(
                file.fileno(),
                self.path,
                f"{self.path.parent}: another process is predicting into this folder; wait until it ends, stop it, or "
                "give another --out",
                "make sure that no other process predicts there",
            )
        except UserError:
            file.close()
            raise
        if not self.path.exists() or not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
            file.close()  # another process has removed it between the two calls
            return self._open()
        file.seek(0)
        return file

    def _write(self, line: str) -> None:
        with naming(self.path):
            self._file.write(line + "\n")
            self._file.flush()


def state_of(image: Path) -> str:
    """Name, size in bytes and time of change of an image as one line; of a missing image the name alone."""
    try:
        status = image.stat()
    except OSError:
        return json.dumps([image.name])
    return json.dumps([image.name, status.st_size, status.st_mtime_ns])
