"""benchmarks/gpu_check.py and what it runs, as far as it goes without a GPU: stages, time limits, partial results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gpu_check = pytest.importorskip("benchmarks.gpu_check", reason="needs the source tree, and tests run from its root")
pytest.importorskip("triton")

from benchmarks import gpu_lines, gpu_sanitize, gpu_train  # noqa: E402
from benchmarks.conftest import copies_beyond_cache  # noqa: E402
from semimoe_fast.training.config import TrainConfig  # noqa: E402

TESTS = """
import time
from pathlib import Path
import pytest

def test_that_runs_second(): assert 1 == 2, "one is not two"
def test_of_cuda_runs_first(): pass
def test_left_out(): pytest.skip("no reason")
@pytest.mark.slow
def test_slow_runs_last():
    Path(__file__).with_name("reached").touch()
    time.sleep(60)
"""
BENCHMARK = """
import os, signal
import pytest, torch
from benchmarks.conftest import device, exact_float32, measure, provider

OPERATION = "objective_terms"

def twice(x): return 2 * x

def test_cuda_is_measured(benchmark):
    benchmark.extra_info["copies"] = 3
    benchmark.pedantic(lambda: None, rounds=4)
def test_cuda_fails(benchmark): benchmark(lambda: 1 / 0)
def test_cuda_crashes(benchmark): os.kill(os.getpid(), signal.SIGSEGV)
def test_of_the_cpu_is_not(benchmark): benchmark(lambda: None)
@pytest.mark.parametrize("size", range(2, 11))  # one more than Dynamo's limit
def test_variants_with_cuda(measure, provider, size):
    if provider != "reference compiled": pytest.skip("eager")
    compiled = torch.compile(twice, backend="eager", fullgraph=True, dynamic=False)
    x = torch.ones(size, requires_grad=True)
    measure(lambda inputs: [compiled(*inputs)], [x], [], [torch.ones(size)], "both")
"""

Start = Callable[..., tuple[int, dict]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run gpu_check on a machine that has a GPU by its own account, on small tests and benchmarks instead of ours."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # nor is there one for the benchmarks, where this machine has one
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests, not of those that are started here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stub")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    monkeypatch.setattr(gpu_check, "TOOLS", ())
    monkeypatch.setattr(gpu_check, "CUDA_TOOLS", "")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")
    for name, text in (("test_some.py", TESTS), ("test_speed.py", BENCHMARK)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu_check, "TESTS", (str(tmp_path / "test_some.py"), "-c", str(tmp_path / "pytest.ini")))
    speed = (str(tmp_path / "test_speed.py"), "-c", str(tmp_path / "pytest.ini"), *gpu_check.ON_CUDA)
    monkeypatch.setattr(gpu_check, "OPERATIONS", speed)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "xdist" else name)

    def build(work, record: dict) -> None:
        record |= {"status": "passed", "built for": work.arch}
        (gpu_check.FOLDER / gpu_check.BUILT).write_text(work.digest)

    monkeypatch.setitem(gpu_check.STAGES, "build", build)

    def run(*arguments: str) -> tuple[int, dict]:
        out = tmp_path / "result.json"
        return gpu_check.main([*arguments, "--out", str(out)]), json.loads(out.read_text())

    return run


def test_failed_tests_and_a_time_limit_leave_results_and_benchmarks(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(subprocess.Popen):
        """Its time is up once the slow test has begun, however long that takes."""

        def wait(self, timeout: float | None = None) -> int:
            while self.poll() is None and timeout is not None and timeout > gpu_check.GRACE:
                if (reached := tmp_path / "reached").exists():
                    reached.unlink()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Impatient)
    status, result = start("tests", "ops")
    assert status == 1
    stages = result["stages"]
    assert list(stages) == ["build", "tests", "ops"]
    assert stages["build"]["built for"] == "90"
    tests = stages["tests"]
    assert tests["status"] == gpu_check.TIME_IS_UP
    assert tests["passed"] == 1
    ((failed, message),) = tests["failed"].items()
    assert failed.endswith("test_that_runs_second")
    assert "one is not two" in message
    assert list(tests["skipped"].values()) == ["Skipped: no reason"]
    lines = gpu_check.read_lines(tmp_path / "gpu" / "tests.jsonl")
    order = [line["test"].split("::")[1] for line in lines if line["outcome"] == "started"]
    assert order == ["test_of_cuda_runs_first", "test_that_runs_second", "test_left_out", "test_slow_runs_last"]
    assert [test.split("::")[1] for test in tests["unfinished"]] == order[-1:]
    ops = stages["ops"]
    assert ops["failed_tests_beside"] == 1
    assert ops["status"].startswith("failed")
    assert [test.split("::")[1] for test in ops["failed"]] == ["test_cuda_fails"]
    assert [test.split("::")[1] for test in ops["unfinished"]] == ["test_cuda_crashes"]
    measured, *variants = ops["benchmarks"]
    assert len(variants) == 9
    assert (measured["name"], measured["extra_info"]) == ("test_cuda_is_measured", {"copies": 3})
    assert measured["stats"]["rounds"] == 4
    assert 0 < measured["stats"]["min"] <= measured["stats"]["median"]


def test_a_broken_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    failed = SimpleNamespace(failed=True)
    gpu_lines.pytest_runtest_logreport(failed)
    assert not statuses

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    gpu_lines.pytest_runtest_logreport(SimpleNamespace(failed=False))
    assert not statuses
    gpu_lines.pytest_runtest_logreport(failed)
    assert statuses == [gpu_lines.LOST] == [gpu_check.LOST]


def passing(work, record: dict) -> None:
    record["status"] = "passed"


def breaking(work, record: dict) -> None:
    raise ValueError("broken")


def leaving(work, record: dict) -> None:
    record["so far"] = 1
    raise SystemExit("ended by SIGTERM")


def test_stages_go_on_where_one_breaks_and_earlier_ones_are_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stage, does in (("tests", passing), ("ops", breaking), ("step", passing), ("train", leaving)):
        monkeypatch.setitem(gpu_check.STAGES, stage, does)
    monkeypatch.setenv("PATH", "")  # no compute-sanitizer, and no git
    assert start("tests")[0] == 0
    status, result = start("sanitize", "ops", "step")
    assert status == 1
    assert result["machine"]["commit"] is None
    states = {stage: record["status"] for stage, record in result["stages"].items()}
    assert states["sanitize"].startswith("skipped: compute-sanitizer is not installed")
    assert states["ops"] == "failed: ValueError('broken')"
    assert states["build"] == states["tests"] == states["step"] == "passed"
    with pytest.raises(SystemExit, match="ended by SIGTERM"):
        start("train")
    left = json.loads((tmp_path / "result.json").read_text())["stages"]
    assert left["train"]["status"] == gpu_check.UNFINISHED
    assert left["train"]["so far"] == 1
    assert left["ops"] == result["stages"]["ops"]
    monkeypatch.setattr(gpu_check, "digest_of", lambda paths: "other sources")
    assert list(start("tests")[1]["stages"]) == ["build", "tests"]


def test_nothing_is_run_on_what_could_not_be_built(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.STAGES, "build", breaking)
    status, result = start("tests")
    assert status == 1
    assert list(result["stages"]) == ["build"]


def test_what_is_missing_is_said(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="speed is no stage: choose from build, tests"):
        start("speed")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "pybind11" else name)
    monkeypatch.setattr(gpu_check, "TOOLS", ("no such tool",))
    with pytest.raises(SystemExit, match="lacks pybind11, no such tool: install them first"):
        start("tests")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU was found"):
        start("tests")


def test_no_process_outlives_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the command, though it ignores the first signal, nor what it has started."""
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    work = gpu_check.Work(time.monotonic() + 1.5, "90", "digest")
    program = "trap '' INT; sleep 60 & echo $!; wait"
    assert work.run("sleep", shutil.which("sh"), "-c", program) is None
    child = int((tmp_path / "sleep.log").read_text())
    assert work.run("late", "no such command") is None  # nothing is started any more
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sanitizer_goes_through_all_cases(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that complains of hazards in a capture, and prints how it was called."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$@" "cached: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-yes}"\n'
        'case "$*" in *racecheck*capture*) exit 9;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    status, result = start("sanitize")
    assert status == 1
    record = result["stages"]["sanitize"]
    assert record["status"] == "failed with exit status 9"
    bad = [case for case, outcome in record["cases"].items() if outcome["exit_status"]]
    assert bad == ["racecheck, capture cluster", "racecheck, capture launches"]
    assert len(record["cases"]) == 3 * len(gpu_sanitize.CASES)
    assert set(gpu_check.SANITIZED) == set(gpu_sanitize.CASES)
    assert "-m benchmarks.gpu_sanitize native cached: 1" in record["cases"]["memcheck, native"]["says"]
    assert "cached: yes" in record["cases"]["memcheck, capture cluster"]["says"]


def test_sanitized_masks_and_kernels_give_what_they_should() -> None:
    gpu_sanitize.native()


def test_runs_of_the_recipe(glands_folder: Path, tmp_path: Path) -> None:
    assert set(gpu_check.RUNS) == set(gpu_train.RUNS)
    for changes in gpu_train.RUNS.values():
        dataclasses.replace(gpu_train.RECIPE, **changes).check()
    data = shutil.copytree(glands_folder, tmp_path / "glands")
    recipe = TrainConfig(image_size=32, width=2, epochs=2, warmup_epochs=0, lr=0.1, device="cpu")
    result = gpu_train.measure("graph", data, recipe)
    assert result["images_per_second"] > 0
    assert len(result["loss"]) == len(result["dice"]) == result["epochs"] == 2
    assert "last, gated" in result["printed"]


def test_inputs_take_turns_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert copies_beyond_cache(2**20, torch.device("cuda")) == 51
    assert copies_beyond_cache(2**30, torch.device("cuda")) == 1
    assert copies_beyond_cache(2**20, torch.device("cpu")) == 1
