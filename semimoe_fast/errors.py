"""Errors that a user can cause and mend, and how the command line shows them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; what the user or the system can cause becomes one line, without a traceback."""
    # Python reads bytes of a file name that are not UTF-8 as surrogates, which a strict stdout refuses to print.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        _leave(f"error: {line}", 2)


def explain(error: BaseException) -> str | None:
    """The error in one line if the user or the system caused it; None for a bug, which needs its traceback."""
    if isinstance(error, UserError):
        line = str(error)
    elif isinstance(error, OSError):
        line = f"{error.filename or 'the system'}: {error.strerror or error}; give a place that can be used"
    elif isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        line = f"the GPU is out of memory{f' for {wanted[1]} more' if wanted else ''}; use smaller batches "
        line += "(in training also --accumulate), a smaller --image-size or --width, or --device cpu"
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        line = "the memory of this machine does not suffice; use smaller batches, a smaller --image-size or --width"
    else:
        return None
    return one_line(line)


def first_sentence(error: BaseException) -> str:
    """Of a library's error, whose text may go on for pages; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].removesuffix(".")[:200]


def warn(text: str) -> None:
    """Print a warning as one line on stderr, above a progress bar if there is one."""
    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)
    sys.stderr.flush()


def one_line(text: str) -> str:
    """The text as it can be printed anywhere; names of files may hold line breaks, and bytes that are not UTF-8."""
    return printable(text).replace("\n", "\\n")


def printable(name: str) -> str:
    """The text with everything that UTF-8 cannot encode written as a backslash sequence."""
    return name.encode("utf-8", "backslashreplace").decode()


def _leave(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
