"""Trouble in a child: from an audit hook, which Python calls before it opens, makes or renames a file."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.chmod", "os.truncate")


def on_opening(below: Path, call: Callable[[str], object], reads: bool = False) -> None:
    """Call call(path) before each opening of a file below a folder: for writing, or for reading if `reads`.

    Files that other languages open are not seen; the package opens every file in Python before safetensors does.
    """

    def hook(event: str, arguments: tuple) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path, writes = os.fsdecode(arguments[0]), bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes != reads and Path(path).is_relative_to(below):
            call(path)

    sys.addaudithook(hook)


def on_change(below: Path, call: Callable[[str], object]) -> None:
    """Call call(path) before each file or folder below a folder is made, opened for writing, renamed or removed."""

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES and Path(os.fsdecode(arguments[0])).is_relative_to(below):
            call(os.fsdecode(arguments[0]))

    on_opening(below, call)
    sys.addaudithook(hook)


def nth(n: int, call: Callable[[str], object], later: bool = False) -> Callable[[str], None]:
    """A function (path) whose n-th call, from 1, calls call(path); with `later` each further one too."""
    left = n

    def count(path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0 or (later and left < 0):
            call(path)

    return count


def failing(number: int) -> Callable[[str], None]:
    """A function (path) that raises the OSError of an error number, such as errno.EACCES."""

    def refuse(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return refuse


def fill_disk(room: int) -> None:
    """From now on no file may grow beyond `room` bytes: writes fail with EFBIG, as on a full disk with ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
