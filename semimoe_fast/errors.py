"""Errors that a user can fix, and how the command line prints them."""

from __future__ import annotations

import errno
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

# Messages of the RuntimeErrors of the CUDA driver, cuBLAS and cuDNN, which torch.OutOfMemoryError does not cover.
GPU_OUT_OF_MEMORY = r"CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED"

OUT_OF_MEMORY = r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc"
SMALLER = "smaller batches, a smaller --image-size or --width, in prediction a smaller --tile-size"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a used up quota, and the limit of a file's size

# Line breaks, and what changes the terminal or the order of the letters: file names may contain them.
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"


class UserError(Exception):
    """An input that cannot be used. The message is one line with the input, its value and the remedy."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function. Errors that `explain` knows end it with one line on stderr, without a traceback.

    Exit status: 2 after such an error, 130 after Ctrl-C, 1 if the reader of a pipe has closed it.
    """
    # File names that are not UTF-8 contain surrogates, which stdout cannot encode by default.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so that Ctrl-C ended the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    previous, threading.excepthook = threading.excepthook, _explain_in_thread
    try:
        main()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        _leave(one_line(str(interrupt) or "interrupted"), 130)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        _leave(f"error: {line}", 2)
    finally:
        threading.excepthook = previous


def explain(error: BaseException) -> str | None:
    """One line for an error that the user or the system caused; None for a bug, which needs its traceback."""
    if isinstance(error, UserError):
        line = str(error)
    elif isinstance(error, OSError) and error.errno != errno.ENOMEM:
        remedy = "free space on its disk" if error.errno in FULL else "give another path"
        line = f"{error.filename or 'the system'}: {error.strerror or error}; {remedy}"
    elif isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib before Python 3.13
        line = f"{error}; give another path"
    elif isinstance(error, torch.OutOfMemoryError) or re.search(GPU_OUT_OF_MEMORY, str(error)):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        line = f"the GPU is out of memory{f' for {wanted[1]} more' if wanted else ''}; in training use --recompute, "
        line += f"--accumulate, {SMALLER}; or --device cpu"
    elif isinstance(error, MemoryError | OSError) or re.search(OUT_OF_MEMORY, str(error)):
        line = f"this machine is out of memory; in training use {SMALLER}"
    else:
        return None
    return one_line(line)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, such as that of a full disk, the file that the block writes."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # others hold a message alone
            error.filename = str(path)
        raise


def _explain_in_thread(failure: threading.ExceptHookArgs) -> None:
    """One line for an error in a helper thread, such as that of TensorBoard when the disk is full."""
    if (line := None if failure.exc_value is None else explain(failure.exc_value)) is None:
        threading.__excepthook__(failure)
    else:
        warn(line)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error message, at most 200 characters; the type of the error if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].removesuffix(".")[:200]


def warn(text: str) -> None:
    """Print a warning as one line on stderr, above the progress bar if one is shown."""
    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)
    sys.stderr.flush()


def one_line(text: str) -> str:
    """The text with a backslash sequence for each control character, and each that UTF-8 cannot encode."""
    return re.sub(CONTROL, lambda found: found[0].encode("unicode_escape").decode(), printable(text))


def printable(name: str) -> str:
    """The text with a backslash sequence for each character that UTF-8 cannot encode."""
    return name.encode("utf-8", "backslashreplace").decode()


def _leave(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
