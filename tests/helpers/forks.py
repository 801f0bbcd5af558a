"""Run calls in forked children, which share the imports of this process and may be killed, limited or broken."""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from semimoe_fast.errors import run_command

ONE_LINE = re.compile(r"error: [^\n]+\n")


@dataclass
class Ended:
    """A child that has ended."""

    status: int  # exit status, or minus the number of the signal that ended it
    output: str  # of stdout and stderr

    @property
    def outcome(self) -> str:
        """Column of the table: "worked", "one line" (an error as the commands print it) or "failed"."""
        if self.status == 0:
            return "worked"
        one_line = self.status == 2 and len(ONE_LINE.findall(self.output)) == 1
        return "one line" if one_line and "Traceback" not in self.output else "failed"


class Child:
    """A forked process that runs `call` as a command: status 2 and one line for an error that the user can fix."""

    def __init__(self, call: Callable[[], object]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pipe, written = os.pipe()  # a limit of file sizes, which a child may set, does not hold for pipes
        os.set_blocking(self.pipe, False)
        self.output = b""
        self.process = os.fork()
        if self.process:
            os.close(written)
            return
        status = 1
        try:
            for stream in (1, 2):
                os.dup2(written, stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
            torch.set_num_threads(torch.get_num_threads())  # makes its pool; two threads that do fail in PyTorch
            run_command(call)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for the end. A child that takes longer is killed: it hangs."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.process, os.WNOHANG))[0]:
            self.read()
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.process, 0)
                self.output += b"\nhangs: killed after %d s" % seconds
                ended = (self.process, signal.SIGKILL)
                break
            time.sleep(0.005)
        self.read()
        os.close(self.pipe)
        return Ended(os.waitstatus_to_exitcode(ended[1]), self.output.decode(errors="replace"))

    def read(self) -> None:
        """Take the output so far out of the pipe. A child whose pipe is full waits."""
        try:
            while part := os.read(self.pipe, 2**16):
                self.output += part
        except BlockingIOError:
            pass


def run_module(name: str, *arguments: str) -> None:
    """What `python -m NAME ARGUMENTS` does, in this process, whose imports are done, with the settings of the tests."""
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception:  # the module has to explain it itself, not Child
        traceback.print_exc()
        raise SystemExit(1) from None


def in_fork(call: Callable[[], object], seconds: float = 120) -> Ended:
    return Child(call).wait(seconds)
