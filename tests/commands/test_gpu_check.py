"""benchmarks/gpu_check.py and its stages on a machine without a GPU: time limits, partial results, result files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gpu_check = pytest.importorskip("benchmarks.gpu_check", reason="needs the source tree, and tests run from its root")
pytest.importorskip("triton")

from benchmarks import gpu_lines, gpu_sanitize, gpu_stages, gpu_train  # noqa: E402
from benchmarks.conftest import copies_beyond_cache  # noqa: E402
from semimoe_fast.training.config import TrainConfig  # noqa: E402

TESTS = """
import time
from pathlib import Path
import pytest

def test_runs_second(): assert 1 == 2, "one is not two"
def test_cuda_runs_first(): pass
def test_skipped(): pytest.skip("no reason")
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
def test_cuda_crashes(benchmark): os.kill(os.getpid(), signal.SIGSEGV)
def test_cuda_fails(benchmark): benchmark(lambda: 1 / 0)
def test_cpu_is_deselected(benchmark): benchmark(lambda: None)
@pytest.mark.parametrize("size", range(2, 11))  # one more than Dynamo's limit
def test_variants_with_cuda(measure, provider, size):
    if provider != "reference compiled": pytest.skip("eager")
    compiled = torch.compile(twice, backend="eager", fullgraph=True, dynamic=False)
    x = torch.ones(size, requires_grad=True)
    measure(lambda inputs: [compiled(*inputs)], [x], [], [torch.ones(size)], "both")
"""

Start = Callable[..., tuple[int, dict]]
MISSING = gpu_check.missing  # the fixture `start` replaces it


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run gpu_check with a stub of `torch.cuda` and with small tests and benchmarks instead of the project's own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the benchmarks run on the CPU, also on a machine with a GPU
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the started tests are not workers of this pytest
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stub")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_stages, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu_stages, "GRACE", 1.0)
    monkeypatch.setattr(gpu_check, "missing", lambda stage: [])
    monkeypatch.setattr(gpu_stages, "CUDA_TOOLS", "")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")
    for name, text in (("test_some.py", TESTS), ("test_speed.py", BENCHMARK)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu_stages, "TESTS", (str(tmp_path / "test_some.py"), "-c", str(tmp_path / "pytest.ini")))
    speed = (str(tmp_path / "test_speed.py"), "-c", str(tmp_path / "pytest.ini"), *gpu_stages.ON_CUDA)
    monkeypatch.setattr(gpu_stages, "OPERATIONS", speed)
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None if name == "xdist" else name)

    def build(work, record: dict) -> None:
        record |= {"status": "passed", "built for": work.arch}
        (gpu_stages.FOLDER / gpu_stages.BUILT).write_text(work.build)

    monkeypatch.setitem(gpu_stages.STAGES, "build", build)

    def run(*arguments: str) -> tuple[int, dict]:
        out = tmp_path / "result.json"
        return gpu_check.main([*arguments, "--out", str(out)]), json.loads(out.read_text())

    return run


@pytest.mark.slow
def test_results_survive_failures_crashes_and_the_time_limit(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = []

    def monotonic() -> float:
        return math.inf if late and late.pop() else time.monotonic()

    class Impatient(subprocess.Popen):
        """The time limit is reached when the slow test has begun, however long that takes."""

        def wait(self, timeout: float | None = None) -> int:
            while self.poll() is None and timeout is not None and timeout > gpu_stages.GRACE:
                if (reached := tmp_path / "reached").exists():
                    reached.unlink()
                    late.append(True)
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_stages.subprocess, "Popen", Impatient)
    monkeypatch.setattr(gpu_stages, "time", SimpleNamespace(monotonic=monotonic))
    status, result = start("tests", "ops")
    assert status == 1
    stages = result["stages"]
    assert list(stages) == ["build", "tests", "ops"]
    assert stages["build"]["built for"] == "90"
    tests = stages["tests"]
    assert tests["status"] == gpu_stages.TIME_IS_UP
    assert tests["passed"] == 1
    ((failed, message),) = tests["failed"].items()
    assert failed.endswith("test_runs_second")
    assert "one is not two" in message
    assert list(tests["skipped"].values()) == ["Skipped: no reason"]
    lines = gpu_check.read_lines(tmp_path / "gpu" / "tests.jsonl")
    order = [line["test"].split("::")[1] for line in lines if line["outcome"] == "started"]
    assert order == ["test_cuda_runs_first", "test_runs_second", "test_skipped", "test_slow_runs_last"]
    assert [test.split("::")[1] for test in tests["unfinished"]] == order[-1:]
    ops = stages["ops"]
    assert ops["failed_tests_beside"] == 1
    assert ops["status"] == f"failed with exit status {-signal.SIGSEGV}"  # of the first process, not of the second
    assert "Segmentation fault" in ops["log"]
    assert "test_cuda_fails" in gpu_check.read(tmp_path / "gpu" / "ops, part 2.log")
    assert [test.split("::")[1] for test in ops["failed"]] == ["test_cuda_fails"]
    assert [test.split("::")[1] for test in ops["unfinished"]] == ["test_cuda_crashes"]
    measured, *variants = ops["benchmarks"]
    assert len(variants) == 9
    assert (measured["name"], measured["extra_info"]) == ("test_cuda_is_measured", {"copies": 3})
    assert measured["stats"]["rounds"] == 4
    assert 0 < measured["stats"]["min"] <= measured["stats"]["median"]


@pytest.mark.slow
def test_crash_of_a_worker_leaves_the_other_tests(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_stages, "WORKERS", 2)
    crash = "import os, signal\ndef test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)\ndef test_passes(): pass\n"
    (tmp_path / "test_some.py").write_text(crash)
    tests = start("tests")[1]["stages"]["tests"]
    assert tests["passed"] == 1
    assert [test.split("::")[1] for test in tests["failed"]] == ["test_crashes"]
    assert "bringing up nodes" in gpu_check.read(tmp_path / "gpu" / "tests.log")


def test_broken_cuda_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    failed = SimpleNamespace(failed=True, longreprtext="AssertionError")
    gpu_lines.pytest_runtest_logreport(failed)
    gpu_lines.pytest_runtest_logreport(SimpleNamespace(failed=True, longreprtext="stream is capturing"))
    assert statuses == [gpu_lines.LOST]
    statuses.clear()

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    gpu_lines.pytest_runtest_logreport(SimpleNamespace(failed=False))
    gpu_lines.pytest_runtest_logreport(failed)
    assert statuses == [gpu_lines.LOST] == [gpu_stages.LOST]


def passing(work: gpu_stages.Work, record: dict) -> None:
    record["status"] = "passed"


def breaking(work: gpu_stages.Work, record: dict) -> None:
    raise ValueError("broken")


def test_other_stages_run_and_earlier_ones_stay_if_one_breaks(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, does in (("tests", passing), ("ops", breaking), ("step", passing)):
        monkeypatch.setitem(gpu_stages.STAGES, stage, does)
    monkeypatch.setenv("PATH", "")  # no compute-sanitizer, and no git
    assert start("tests")[0] == 0
    status, result = start("sanitize", "ops", "step")
    assert status == 1
    assert result["stages"]["step"]["commit"] is None
    states = {stage: record["status"] for stage, record in result["stages"].items()}
    assert states["sanitize"].startswith("skipped: compute-sanitizer is not installed")
    assert states["ops"] == "failed: ValueError('broken')"
    assert states["build"] == states["tests"] == states["step"] == "passed"
    monkeypatch.setattr(gpu_check, "commit", lambda: "another commit of the same files")
    result = start("step")[1]
    assert list(result["stages"]) == ["build", "tests", "sanitize", "ops", "step"]
    assert result["stages"]["step"]["commit"] == "another commit of the same files"
    assert result["stages"]["tests"]["commit"] is None


@pytest.mark.parametrize(("changed", "stages"), [("csrc", ["build", "tests"]), ("tests", ["tests"])])
def test_changed_files_drop_earlier_stages(
    changed: str, stages: list[str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed sources are built again; changed tests are not."""
    for stage in ("tests", "step"):
        monkeypatch.setitem(gpu_stages.STAGES, stage, passing)
    monkeypatch.setattr(gpu_check, "digest_of", str)
    assert list(start("step")[1]["stages"]) == ["build", "step"]
    monkeypatch.setattr(gpu_check, "digest_of", lambda paths: f"{paths}, changed" if changed in paths else str(paths))
    assert list(start("tests")[1]["stages"]) == stages


def test_sigterm_leaves_the_results_so_far(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handlers = {}
    monkeypatch.setattr(gpu_check.signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    out = tmp_path / "result.json"

    def stage(work: gpu_stages.Work, record: dict) -> None:
        written = json.loads(out.read_text())["stages"]["train"]
        assert written["status"] == gpu_stages.UNFINISHED
        record["so far"] = 1
        try:
            handlers[signal.SIGTERM]()
        finally:  # the command of a real stage may take longer to end than the process has left
            assert json.loads(out.read_text())["stages"]["train"]["so far"] == 1

    monkeypatch.setitem(gpu_stages.STAGES, "train", stage)
    with pytest.raises(SystemExit, match="ended by SIGTERM"):
        start("train")
    assert json.loads(out.read_text())["stages"]["train"]["status"] == gpu_stages.UNFINISHED


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stages": {"tests": 1}}'])
def test_damaged_result_file_is_replaced(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(text)
    assert gpu_check.earlier_stages(tmp_path / "result.json", {}) == {}
    assert "result.json is not a result file of gpu-check" in capsys.readouterr().out


def test_failed_build_runs_no_other_stage(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_stages.STAGES, "build", breaking)
    status, result = start("tests")
    assert status == 1
    assert list(result["stages"]) == ["build"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "speed is no stage: choose from build, tests"),
        (["--minutes", "0"], "0 is not a positive, finite number of minutes"),
        (["--minutes", "inf"], "inf is not a positive, finite number of minutes"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        gpu_check.main(arguments)
    assert message in f"{refusal.value}{capsys.readouterr().err}"


def test_stages_may_stand_on_both_sides_of_an_option(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("tests", "step"):
        monkeypatch.setitem(gpu_stages.STAGES, stage, passing)
    assert list(start("tests", "--minutes", "3", "step")[1]["stages"]) == ["build", "tests", "step"]


def test_stage_without_its_packages_is_skipped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "missing", MISSING)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "skimage" else name)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: name)
    monkeypatch.setitem(gpu_stages.STAGES, "train", passing)
    status, result = start("tests", "train")
    assert status == 1
    assert result["stages"]["tests"]["status"] == f"skipped: {sys.executable} lacks skimage: install them first"
    assert result["stages"]["train"]["status"] == "passed"
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    assert gpu_check.missing("build") == list(gpu_stages.TOOLS)
    monkeypatch.setattr(gpu_check, "version", lambda name: "76.1.0")
    assert gpu_check.missing("build") == ["setuptools 77", *gpu_stages.TOOLS]


def test_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU was found"):
        gpu_check.main(["tests"])


def test_time_limit_ends_a_command_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ignores SIGINT; it and its child get SIGKILL. Results are saved while it runs."""
    monkeypatch.setattr(gpu_stages, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_stages, "GRACE", 0.5)
    monkeypatch.setattr(gpu_stages, "SAVING", 0.4)
    saved = []
    work = gpu_stages.Work(time.monotonic() + 1.5, "90", "digest", lambda: saved.append(time.monotonic()))
    program = "trap '' INT; sleep 60 & echo $!; wait"
    assert work.run("sleep", shutil.which("sh"), "-c", program) is None
    assert saved
    child = int((tmp_path / "sleep.log").read_text())
    assert work.run("late", "no such command") is None  # no command starts after the time limit
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sanitizer_runs_every_case(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stub of compute-sanitizer prints its arguments and reports hazards in captures."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$@" "cached: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-yes}"\n'
        'case "$*" in *racecheck*capture*) exit 9;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    written, write = [], gpu_check.Check.write

    def note_and_write(check: gpu_check.Check) -> None:
        written.append(len(check.current.get("cases", [])))
        write(check)

    monkeypatch.setattr(gpu_check.Check, "write", note_and_write)
    status, result = start("sanitize")
    assert status == 1
    record = result["stages"]["sanitize"]
    assert record["status"] == "failed with exit status 9"
    bad = [case for case, outcome in record["cases"].items() if outcome["exit_status"]]
    assert bad == ["racecheck, capture cluster", "racecheck, capture launches"]
    assert len(record["cases"]) == 3 * len(gpu_sanitize.CASES)
    assert set(written) == set(range(1 + len(record["cases"])))  # the file is written after every case
    assert set(gpu_stages.SANITIZED) == set(gpu_sanitize.CASES)
    assert "-m benchmarks.gpu_sanitize native cached: 1" in record["cases"]["memcheck, native"]["says"]
    assert "cached: yes" in record["cases"]["memcheck, capture cluster"]["says"]


def test_train_stage_saves_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "FOLDER", tmp_path)

    class Instant(gpu_stages.Work):
        def python(self, log: str, *arguments: str | Path, **variables: str) -> int:
            Path(arguments[-1]).write_text('{"epochs": 10}')
            return 0

    record, saved = {"status": gpu_stages.UNFINISHED}, []
    gpu_stages.train(Instant(0, "90", "digest", lambda: saved.append(dict(record["runs"]))), record)
    assert [list(runs) for runs in saved] == [list(gpu_stages.RUNS[: n + 1]) for n in range(len(gpu_stages.RUNS))]
    assert record == {"status": "passed", "runs": {run: {"epochs": 10} for run in gpu_stages.RUNS}}


def test_sanitized_distances_equal_those_of_the_cpu() -> None:
    gpu_sanitize.native()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gating", "objective"])
def test_sanitized_triton_kernels_run(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_sanitize, "FEATURES", ((5, 1, 33),))
    monkeypatch.setattr(gpu_sanitize, "LOGITS", ((1, 33),))
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize", case])
    monkeypatch.setenv("SEMIMOE_BACKEND", "")  # main() sets it; this restores it
    gpu_sanitize.main()
    assert capsys.readouterr().out == f"{case}: done\n"


def test_training_run_is_measured(glands_folder: Path, tmp_path: Path) -> None:
    assert set(gpu_stages.RUNS) == set(gpu_train.RUNS)
    for changes in gpu_train.RUNS.values():
        dataclasses.replace(gpu_train.RECIPE, **changes).check()
    data = shutil.copytree(glands_folder, tmp_path / "glands")
    recipe = TrainConfig(image_size=32, width=2, epochs=2, warmup_epochs=0, lr=0.1, device="cpu")
    result = gpu_train.measure("graph", data, recipe)
    assert result["images_per_second"] > 0
    assert len(result["loss"]) == len(result["dice"]) == result["epochs"] == 2
    assert "last, gated" in result["printed"]


def test_copies_of_the_inputs_exceed_the_l2_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    assert copies_beyond_cache(2**20, torch.device("cuda")) == 51
    assert copies_beyond_cache(2**30, torch.device("cuda")) == 1
    assert copies_beyond_cache(2**20, torch.device("cpu")) == 1
