"""The programs of tests/fuzz, built with the address, the undefined-behavior and the thread sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("fuzz_distance", "fuzz_objective", "fuzz_batch_norm", "fuzz_blur", "fuzz_pooling")


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} was not found")
    return found


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_native_fuzzers(table, attempt, everything: bool, tmp_path: Path, sanitizer: str) -> None:
    """Random cases against their definitions, by every instruction set of this machine; a failure prints its seed."""
    settings = {"FUZZ": "ON", "SANITIZE": sanitizer}
    definitions = [f"-DSEMIMOE_{name}={value}" for name, value in settings.items()]
    make = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    subprocess.run([tool("cmake"), "-S", ROOT, "-B", tmp_path, "-G", "Ninja", make, *definitions], check=True)
    subprocess.run([tool("cmake"), "--build", tmp_path], check=True)
    title = f"native code, random cases, {sanitizer}"

    def case(program: str) -> None:
        command = [tmp_path / program, "60" if everything else "3", str(time.time_ns())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssertionError(f"{program}: {done.stderr}")
        cases = int(re.match(r"(\d+) images", done.stdout)[1])
        table(title)["tried"] += cases - 1  # `attempt` counts one
        table(title)["worked"] += cases - 1

    for program in PROGRAMS:
        attempt(title, program, case, program)
