"""Errors that a command prints as one line, and errors that keep their traceback."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from semimoe_fast.errors import UserError, explain, naming, one_line, printable, run_command, warn

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB.\nSee documentation"
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x: is no y; give z"), "x: is no y; give z"),
        (UserError("a\nb: is no y"), "a\\nb: is no y"),
        (OSError(2, "No such file or directory", "f"), "f: No such file or directory; give another path"),
        (
            torch.OutOfMemoryError(GPU),
            "the GPU is out of memory for 2.00 GiB more; in training use --recompute, ",
        ),
        (RuntimeError("CUDA error: out of memory"), "the GPU is out of memory; in training use --recompute"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"), "the GPU is out of me"),
        (RuntimeError(CPU), "this machine is out of memory; in training use smaller batches"),
        (MemoryError(), "this machine is out of memory; in training use smaller batches"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "this machine is out of memory; in training use smaller batches",
        ),
        (RuntimeError("Symlink loop from '/a'"), "Symlink loop from '/a'; give another path"),
        (RuntimeError("std::bad_alloc"), "this machine is out of memory; in training use smaller batches"),
    ],
)
def test_user_and_system_errors_are_one_line(error: Exception, line: str, capsys) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(fail)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {line}")
    assert told.count("\n") == 1


def test_gpu_memory_error_names_the_options(capsys) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError(GPU)

    with pytest.raises(SystemExit):
        run_command(fail)
    told = capsys.readouterr().err
    assert all(option in told for option in ("--recompute", "--accumulate", "--image-size", "--width", "--device cpu"))


def test_error_of_a_helper_thread_is_one_line(capsys) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events")

    def main() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    run_command(main)
    assert capsys.readouterr().err == "warning: events: No space left on device; free space on its disk\n"


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_names_that_are_not_utf8_are_printed(capfd) -> None:
    name = "a\udce9"  # a file name of the bytes 61 e9
    run_command(lambda: print(name))
    warn(f"{name}\nb")
    out, err = capfd.readouterr()
    assert (out, err) == ("a\\udce9\n", "warning: a\\udce9\\nb\n")
    assert printable(f"ü{name}") == "üa\\udce9"


def test_control_characters_of_names_are_shown_escaped() -> None:
    """A name may not clear the terminal, start a line or turn the order of the letters round."""
    assert one_line("a\x1b[2J\nb\x9b\u202egnp.exe\t") == "a\\x1b[2J\\nb\\x9b\\u202egnp.exe\\t"
    assert one_line("Größe 1 µm") == "Größe 1 µm"


def test_errors_of_writing_name_the_file() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, line in (
        (full, "out.tif: No space left on device; free space on its disk"),
        (OSError(errno.EACCES, "Permission denied", "other"), "other: Permission denied; give another path"),
        (OSError("encoder error -2"), "the system: encoder error -2; give another path"),
    ):
        with pytest.raises(OSError, match=r"left|denied|-2") as caught, naming(Path("out.tif")):
            raise error
        assert explain(caught.value) == line
