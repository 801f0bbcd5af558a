"""The stages of `make gpu-check`: what each of them runs, and how commands are run within a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu"
BUILT = "built"  # a file in FOLDER: the `build` of the Work that was built last
CUDA_TOOLS = "/usr/local/cuda/bin"  # nvcc and compute-sanitizer, if they are not on the path
GRACE = 15.0  # seconds between SIGINT and SIGKILL
SAVING = 20.0  # seconds from one writing of the result file to the next
WORKERS = 8

# The packaging tests are left out: they install the tree into environments of their own and use no GPU.
TESTS = ("tests", "--ignore=tests/commands/test_packaging.py")
OF_THE_GPU = (
    r"\[cuda\b(?! on)",  # not "cuda on the cpu", the emulator
    "_cuda_(?!kernels|context|function)",
    "_synchroniz",
    "_of_a_gpu_",
    r"numba\.cuda",
    "cupy",
)
TESTS_FIRST = (
    *OF_THE_GPU,
    r"(gate_triton|adaptive)\.py",
    "triton",
    r"test_(functional|profile)\.py",
)
ON_CUDA = ("-k", "cuda or cupy or cucim or monai")
MEASURED = ("distance", "instances", "batch_norm", "objective", "gate", "fold_upsampling")
OPERATIONS = (*(f"benchmarks/test_{name}.py" for name in MEASURED), *ON_CUDA)
OPERATIONS_FIRST = (
    r"glands\[(64-256|8-1024)-",
    r"instances\[",
    r"multi_gate\[cuda-.*-bf16-8-both-channels-last",
    r"joint-8-both",
    r"batch_norm_relu\[.*channels-last",
    r"label_projections",
    r"-both",
    r"glands",
)
STEPS = ("benchmarks/test_step.py", *ON_CUDA)
RATIOS = "from benchmarks.step_ratios import Options, main; main(Options(only_cuda=True, ablation=False))"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = (
    "native",
    "instances",
    "capture cluster",
    "capture launches",
    "gating",
    "objective",
    "normalization",
)  # cases of gpu_sanitize.py
RUNS = ("graph", "eager", "profile", "compiled")  # runs of gpu_train.py

UNFINISHED, TIME_IS_UP = "interrupted", "the time was up"
LOST = 77  # exit status of benchmarks/gpu_lines.py for a broken CUDA context

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The time limit, the GPU and the sources of a stage, and how to save its record."""

    until: float  # end of the stage, in seconds of time.monotonic()
    arch: str  # compute capability without the dot, such as 90
    build: str  # sources, GPU and Python of the build
    save: Callable[[], None] = lambda: None  # writes the result file

    @property
    def site(self) -> Path:
        return FOLDER / "site"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a command. Its import path is the built package, PYTHONPATH, then the root for benchmarks/."""
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
        tools = os.pathsep.join([os.environ.get("PATH", ""), CUDA_TOOLS])
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": tools}

    def run(self, log: str, *command: str | Path, **variables: str) -> int | None:
        """Run a command with its output in build/gpu; return its exit status, or None if its time was up."""
        with (FOLDER / f"{log}.log").open("w") as output:
            if time.monotonic() >= self.until:
                return None
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while (left := self.until - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(min(left, SAVING))
                    self.save()
                return None
            finally:
                end(process)

    def python(self, log: str, *arguments: str | Path, **variables: str) -> int | None:
        """Run Python as `run` does. -P keeps the current folder off the path, so that the built package is imported."""
        return self.run(log, sys.executable, "-P", *arguments, **variables)

    def pytest(self, record: Record, log: str, first: Sequence[str], *arguments: str, **variables: str) -> None:
        """Run pytest, the tests that match `first` first, and record its exit status and the outcome of each test.

        If a test crashes the process, a new process runs the remaining tests; its log has a number.
        """
        record["lines"] = f"{log}.jsonl"
        lines, done = FOLDER / record["lines"], FOLDER / f"{log}.done.jsonl"
        lines.write_text("")
        options = ["-p", "benchmarks.gpu_lines", f"--lines={lines}", f"--done={done}"]
        options += [f"--first={pattern}" for pattern in first]
        crashes, crashed = 0, True
        while crashed:
            shutil.copy(lines, done)
            part = f"{log}, part {crashes + 1}" if crashes else log
            status = self.python(part, "-m", "pytest", "-q", *options, *arguments, **variables)
            note_end(record, status, part)
            self.save()
            crashed = status is not None and (status < 0 or status == LOST) and read(lines) != read(done)
            crashes += crashed


def end(process: subprocess.Popen) -> None:
    """End a command and every process of its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def note_end(record: Record, status: int | None, log: str) -> None:
    """Record the exit status of a command. The first failure of a stage and the end of its log stay."""
    if record["status"] not in ("passed", UNFINISHED):
        return
    if status == 0:
        record["status"] = "passed"
        return
    record["status"] = TIME_IS_UP if status is None else f"failed with exit status {status}"
    text = read(FOLDER / f"{log}.log")
    crash = text.find("Fatal Python error")  # the stack of a crash may be long, and its reason stands first
    record["log"] = text[crash:][:4000] if crash >= 0 else text[-4000:]


# ------------------------------------------------------------------------------------------------------------- stages


def build(work: Work, record: Record) -> None:
    """Build the package for this machine's GPU only, with the CUDA kernels if nvcc is found."""
    shutil.rmtree(work.site, ignore_errors=True)
    (FOLDER / BUILT).unlink(missing_ok=True)
    pip = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    for cuda in ("ON", "OFF"):  # without the CUDA kernels, the Triton kernels and the training still run
        variables = {"SEMIMOE_CUDA": cuda, "SEMIMOE_CUDA_ARCHS": work.arch}
        status = work.run(f"build, CUDA {cuda}", sys.executable, *pip, work.site, ROOT, **variables)
        note_end(record, status, f"build, CUDA {cuda}")
        if status == 0 or status is None:
            break
    if status == 0:
        program = "import json, _semimoe_fast; print(json.dumps(_semimoe_fast.built_with))"
        command = [sys.executable, "-P", "-c", program]
        record["native"] = json.loads(subprocess.check_output(command, env=work.environment))
        (FOLDER / BUILT).write_text(work.build)


def tests(work: Work, record: Record) -> None:
    parallel = ["-n", str(WORKERS), "--maxschedchunk=4"] if importlib.util.find_spec("xdist") else []
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    work.pytest(record, "tests", TESTS_FIRST, *TESTS, *parallel, OMP_NUM_THREADS=threads)


def sanitize(work: Work, record: Record) -> None:
    """Run the kernels under NVIDIA's compute-sanitizer, each case in its own process."""
    sanitizer = shutil.which("compute-sanitizer", path=work.environment["PATH"])
    if sanitizer is None:
        record["status"] = "skipped: compute-sanitizer is not installed; it comes with the CUDA toolkit"
        return
    record["cases"] = {}
    for tool in SANITIZER_TOOLS:
        for case in SANITIZED:
            log = f"{tool}, {case}"
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            program = [sys.executable, "-P", "-m", "benchmarks.gpu_sanitize", case]
            # PyTorch's caching allocator hides accesses beyond a tensor, but a capture needs it.
            uncached = {} if case.startswith("capture") else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status = work.run(log, *command, *program, **uncached)
            note_end(record, status, log)
            output = read(FOLDER / f"{log}.log")
            record["cases"][log] = {"exit_status": status, "says": output if status else output[-200:]}
            work.save()
            if status is None:
                return


def operations(work: Work, record: Record) -> None:
    work.pytest(record, "ops", OPERATIONS_FIRST, *OPERATIONS, "--benchmark-only")


def step(work: Work, record: Record) -> None:
    try:
        note_end(record, work.python("step", "-c", RATIOS), "step")
    finally:
        record["ratios"] = read(FOLDER / "step.log").splitlines()
    work.pytest(record, "steps", [], *STEPS, "--benchmark-only")


def train(work: Work, record: Record) -> None:
    """Train ten epochs of the published recipe in several ways."""
    record["runs"] = {}
    for run in RUNS:
        result = FOLDER / f"train, {run}.json"
        result.unlink(missing_ok=True)
        status = work.python(f"train, {run}", "-m", "benchmarks.gpu_train", run, FOLDER / "glands", result)
        note_end(record, status, f"train, {run}")
        record["runs"][run] = json.loads(read(result) or "null")
        work.save()
        if status is None:
            return


STAGES: dict[str, Callable[[Work, Record], None]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "ops": operations,
    "step": step,
    "train": train,
}

# What a stage needs: modules to import, and tools that are on the path or in Python's scripts folder.
TOOLS = ("cmake", "ninja")
_RUN = ("torch", "triton", "numpy")
_TRAIN = (*_RUN, "PIL", "matplotlib", "safetensors", "tqdm")
_MEASURE = (*_TRAIN, "pytest", "pytest_benchmark", "scipy", "skimage")
OLDEST = {"setuptools": 77}  # or newer: older ones refuse the license of pyproject.toml
NEEDS: dict[str, tuple[str, ...]] = {
    "build": ("pip", "setuptools", "pybind11", *TOOLS),
    "tests": (*_MEASURE, "hypothesis"),
    "sanitize": _RUN,
    "ops": _MEASURE,
    "step": _MEASURE,
    "train": _TRAIN,
}


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
