"""The CPU kernels under sanitizers on random cases, and the symbols that their object files define."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest
from patience import run_patiently

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file(), reason="needs the source tree around the tests"
)


def tool(name: str) -> str:
    """The path of a tool that is on the path or in Python's scripts folder."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip(f"{name} was not found")
    return found


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which CMake has configured the programs of tests/fuzz."""
    tool(shlex.split(COMPILER)[0])
    build = tmp_path_factory.mktemp("fuzz")
    settings = {"SEMIMOE_FUZZ": "ON", "CMAKE_MAKE_PROGRAM": tool("ninja"), "CMAKE_EXPORT_COMPILE_COMMANDS": "ON"}
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    run(tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", *definitions)
    return build


def run(*command: str | Path) -> str:
    done = run_patiently(command, env={**os.environ, "CXX": COMPILER}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", ["fuzz_distance", "fuzz_objective", "fuzz_batch_norm", "fuzz_blur", "fuzz_pooling"])
def test_random_cases_under_sanitizers(program: str, build: Path, tmp_path: Path) -> None:
    probe = [*shlex.split(COMPILER), "-fsanitize=address,undefined", "-x", "c++", "-", "-o", tmp_path / "probe"]
    if run_patiently(probe, input=b"int main() {}", capture_output=True).returncode != 0:
        pytest.skip("the compiler's sanitizers were not found")
    run(tool("cmake"), "--build", build)
    output = run(build / program, "2", "0")
    print(output)  # how many cases were checked in 2 s
    checked = re.match(r"(\d+) images checked", output)
    assert checked is not None
    assert int(checked[1]) > 0  # the number depends on the machine


def test_kernels_share_no_function(build: Path) -> None:
    """The linker keeps one copy of a shared function, which may use instructions that the processor lacks.

    Compiled without optimization, which puts no function into its caller.
    """
    commands = json.loads((build / "compile_commands.json").read_text())
    kernels = [shlex.split(entry["command"]) for entry in commands if entry["file"].endswith("kernels.cpp")]
    assert kernels
    for command in kernels:
        (name,) = re.findall(r"-DSEMIMOE_SIMD=(\w+)", " ".join(command))
        (table,) = re.findall(r"csrc/(\w+)\.cpp$", command[-1])
        compiled = build / f"{name}_{table}.o"
        command[command.index("-o") + 1] = str(compiled)
        run(*command, "-fno-sanitize=all", "-O0")
        symbols = run(tool("nm"), "--extern-only", "--defined-only", "--demangle", "--format=posix", compiled)
        assert [line.rsplit(maxsplit=3)[0] for line in symbols.splitlines()] == [f"semimoe::{name}::{table}"]
