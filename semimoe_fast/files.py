"""Files that are written as a whole: after a crash or an error, a file is the old or the new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import naming


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, as `replacing` does."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, uint8 (H, W) or (H, W, 3) or uint16 (H, W), as `replacing` does."""
    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, "PNG"))


def write_atomically(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Call write(temporary path) and rename the file to `path`, as `replacing` does."""
    with replacing(path, shared) as part, naming(path):
        write(part)


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to: a block without error syncs the file and renames it to `path`.

    So after a crash or an error, `path` is the old or the new file. shared: several processes may write the same
    content to `path` at once, so each uses its own temporary path. Otherwise the temporary path is always the same, so
    the next call overwrites what a killed process left behind.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part" if shared else f".{path.name}.part")
    try:
        part.touch()
        permissions = part.stat().st_mode  # as the umask sets them; some writers ignore the umask
        yield part
        part.chmod(permissions)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
