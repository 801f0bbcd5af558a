"""Which images of a folder are predicted, so that the same call after an interruption goes on with the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = ".predict.jsonl"


class Finished:
    """The images that calls with the same settings have predicted, in a file in the folder of the outputs.

    The first line of the file holds the settings, JSON values; a file with others is replaced. Every further line is an
    image: its name, size in bytes and time of change. `forget` removes the file once all images are predicted.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / NAME
        self._first = json.dumps(settings, sort_keys=True)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        self.resumed = lines[:1] == [self._first]  # such a call was interrupted
        self._lines = set(lines[1:] if self.resumed else [])

    def begin(self) -> None:
        """Start the file, unless it is that of an interrupted call."""
        if not self.resumed:
            self.path.write_text(self._first + "\n")

    def __contains__(self, image: Path) -> bool:
        return image.exists() and _line(image) in self._lines

    def add(self, image: Path) -> None:
        """Call it when all outputs of an image are in place."""
        with self.path.open("a") as file:
            file.write(_line(image) + "\n")

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _line(image: Path) -> str:
    status = image.stat()
    return json.dumps([image.name, status.st_size, status.st_mtime_ns])
