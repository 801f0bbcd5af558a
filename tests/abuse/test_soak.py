"""Memory and open files stay flat: a run with validation and checkpoints each epoch, and calls of every operation."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from forks import in_fork
from operations import call, draw
from runs import records, start

from semimoe_fast import ops
from semimoe_fast.training.run_folder import METRICS_FILE

BYTES_PER_CALL = 1024
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(process: int | str = "self") -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def slope(values: list[int]) -> float:
    """Growth from one value to the next, by least squares, without the first half: the warm-up."""
    kept = values[len(values) // 2 :]
    return float(np.polyfit(range(len(kept)), kept, 1)[0])


def test_training(attempt, config, everything: bool, tmp_path: Path) -> None:
    """Growth in bytes per step; each epoch of two steps validates and writes both checkpoints."""

    def case() -> None:
        run = tmp_path / "run"
        (child,) = start(dataclasses.replace(config, epochs=10**6, decay_epochs=10**6), run)
        memory, files, started = [], [], time.monotonic()
        while time.monotonic() - started < (1800 if everything else 75):
            time.sleep(0.25)
            child.read()
            memory.append(resident(child.process))
            files.append(len(list(Path(f"/proc/{child.process}/fd").iterdir())))
        pause = time.time() - (run / METRICS_FILE).stat().st_mtime
        child.kill()
        child.wait()
        steps = 2 * len(records(run))
        growth = slope(memory) * len(memory) / steps
        print(f"\n{steps} steps, {growth:.0f} bytes a step, {files[-1]} open files")
        assert pause < 30, f"training has stopped {pause:.0f} s ago, after {steps} steps"
        assert growth < BYTES_PER_CALL, f"memory grows by {growth:.0f} bytes a step in {steps} steps"
        assert max(files[len(files) // 2 :]) <= max(files[: len(files) // 2]), f"open files: {files}"

    attempt("soak: training", "training", case)


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_calls(attempt, operation: str, everything: bool) -> None:
    """Growth in bytes per call."""

    def soak() -> None:
        arguments, memory, files = draw()[operation], [], []
        for number in range(20_000 if everything else 1500):
            call(operation, arguments)
            if number % 10 == 0:
                memory.append(resident())
                files.append(len(list(Path("/proc/self/fd").iterdir())))
        print("\n" + json.dumps([slope(memory) / 10, files[-1] - files[0]]))

    def case() -> None:
        gc.collect()
        ended = in_fork(soak, seconds=1800)
        if ended.status != 0:
            raise AssertionError(ended.output)
        growth, more_files = json.loads(ended.output.splitlines()[-1])
        assert growth < BYTES_PER_CALL, f"memory grows by {growth:.0f} bytes a call"
        assert more_files == 0, f"{more_files} more open files"

    attempt("soak: calls of operations", operation, case)
