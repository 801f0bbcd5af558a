"""`make gpu-check`: this project on a machine with a CUDA GPU, stage by stage, summed up in one JSON file.

    python benchmarks/gpu_check.py [build] [tests] [sanitize] [ops] [step] [train] [--minutes N] [--out FILE]

Uses the Python it is started with and the PyTorch installed there, and no network. Every stage is ended after some
minutes, the most important parts of each come first, and the file is written after each stage with what is known by
then, also where the time is up or the process is told to end. It keeps the stages of earlier commands on the same
machine and sources. The package is built into build/gpu, where the logs are too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "gpu_check.json"
FOLDER = ROOT / "build" / "gpu"
BUILT = "built"  # a file in the folder, with the digest of the sources that were built
# What building, testing and measuring import, by module name, but for the benchmarks' peers.
NEEDED = """torch triton numpy PIL matplotlib safetensors tqdm pytest pytest_benchmark hypothesis scipy skimage
            pip setuptools pybind11""".split()
TOOLS = ("cmake", "ninja")  # on the path, or beside Python
CUDA_TOOLS = "/usr/local/cuda/bin"  # nvcc and compute-sanitizer, where they are not on the path
BUILT_FROM = ("csrc", "kernels", "semimoe_fast", "CMakeLists.txt", "pyproject.toml", "setup.py")
MINUTES = 9.0
GRACE = 15.0  # seconds that a command has to finish once it is told to
WORKERS = 8

# The packaging tests install the tree into environments of their own, which says nothing about the GPU.
TESTS = ("tests", "--ignore=tests/commands/test_packaging.py", "-m", "not network")
TESTS_FIRST = (
    "cuda(?! on the cpu)|_gpu_|_device",
    r"(gate|adaptive)_kernels?\.py",
    "triton",
    r"test_(functional|profile)\.py",
)
ON_CUDA = ("-k", "cuda or cupy or cucim or monai")
OPERATIONS = ("benchmarks/test_targets.py", "benchmarks/test_losses.py", "benchmarks/test_gating.py", *ON_CUDA)
OPERATIONS_FIRST = (
    r"glands\[(64-256|8-1024)-",
    r"gating\[cuda-.*-bf16-8-both-channels-last",
    r"joint-8-both",
    r"pseudo_labels",
    r"-both",
    r"glands",
)
STEPS = ("benchmarks/test_step.py", *ON_CUDA)
RATIOS = "from benchmarks.step_ratios import Options, main; main(Options(only_cuda=True, ablation=False))"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = ("native", "capture cluster", "capture launches", "gating", "objective")  # of gpu_sanitize.py
RUNS = ("graph", "eager", "profile", "compiled")  # of gpu_train.py

UNFINISHED, TIME_IS_UP = "interrupted", "the time was up"
LOST = 77  # exit status of benchmarks/gpu_lines.py for a CUDA context that is broken

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Where and until when a stage works."""

    until: float  # of time.monotonic()
    arch: str  # such as 90
    digest: str  # of the sources

    @property
    def site(self) -> Path:
        return FOLDER / "site"

    @property
    def environment(self) -> dict[str, str]:
        """In which Python finds the package as it was built, then what is installed, then benchmarks/."""
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
        tools = os.pathsep.join([os.environ.get("PATH", ""), CUDA_TOOLS])
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": tools}

    def run(self, log: str, *command: str | Path, **variables: str) -> int | None:
        """The exit status of a command, whose output goes to a file in build/gpu; None where its time was up."""
        with (FOLDER / f"{log}.log").open("w") as output:
            left = self.until - time.monotonic()
            if left <= 0:
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
                return process.wait(left)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process)

    def python(self, log: str, *arguments: str | Path, **variables: str) -> int | None:
        """As `run`. -P keeps the current folder off the path, so that the package is the one that was built."""
        return self.run(log, sys.executable, "-P", *arguments, **variables)

    def pytest(self, record: Record, log: str, first: Sequence[str], *arguments: str, **variables: str) -> None:
        """Run pytest, the tests that match `first` first, and note how it ended and what each test did, if it did.

        Where a test takes the process with it, another one goes on with the tests behind it.
        """
        lines, done = FOLDER / f"{log}.jsonl", FOLDER / f"{log}.done.jsonl"
        lines.write_text("")
        options = ["-p", "benchmarks.gpu_lines", f"--lines={lines}", f"--done={done}"]
        options += [f"--first={pattern}" for pattern in first]
        crashed = True
        try:
            while crashed:
                shutil.copy(lines, done)
                status = self.python(log, "-m", "pytest", "-q", *options, *arguments, **variables)
                note_end(record, status, log)
                crashed = status is not None and (status < 0 or status == LOST) and read(lines) != read(done)
        finally:
            record |= summarize(read_lines(lines))


def end(process: subprocess.Popen) -> None:
    """Leave no process of a command's session behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def note_end(record: Record, status: int | None, log: str) -> None:
    """How a command ended, and unless it ended well, the last of what it said. The first failure of a stage stays."""
    if status == 0:
        record["status"] = "passed" if record["status"] in ("passed", UNFINISHED) else record["status"]
        return
    record["status"] = TIME_IS_UP if status is None else f"failed with exit status {status}"
    record["log"] = (FOLDER / f"{log}.log").read_text(errors="replace")[-4000:]


# ------------------------------------------------------------------------------------------------------------- stages


def build(work: Work, record: Record) -> None:
    """The package, with the CUDA kernels where nvcc is, for this machine's GPU alone."""
    shutil.rmtree(work.site, ignore_errors=True)
    (FOLDER / BUILT).unlink(missing_ok=True)
    pip = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    for cuda in ("ON", "OFF"):  # without the CUDA kernels, Triton's and the training can still be looked at
        variables = {"SEMIMOE_CUDA": cuda, "SEMIMOE_CUDA_ARCHS": work.arch}
        status = work.run(f"build, CUDA {cuda}", sys.executable, *pip, work.site, ROOT, **variables)
        note_end(record, status, f"build, CUDA {cuda}")
        if status == 0 or status is None:
            break
    if status == 0:
        program = "import json, _semimoe_fast; print(json.dumps(_semimoe_fast.built_with))"
        command = [sys.executable, "-P", "-c", program]
        record["native"] = json.loads(subprocess.check_output(command, env=work.environment))
        (FOLDER / BUILT).write_text(work.digest)


def tests(work: Work, record: Record) -> None:
    parallel = ["-n", str(WORKERS), "--maxschedchunk=4"] if importlib.util.find_spec("xdist") else []
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    work.pytest(record, "tests", TESTS_FIRST, *TESTS, *parallel, OMP_NUM_THREADS=threads)


def sanitize(work: Work, record: Record) -> None:
    """NVIDIA's compute-sanitizer over the kernels, each case in a process of its own."""
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
            # Otherwise PyTorch's cache of memory hides what lies beyond a tensor; a capture needs the cache.
            uncached = {} if case.startswith("capture") else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status = work.run(log, *command, *program, **uncached)
            note_end(record, status, log)
            said = (FOLDER / f"{log}.log").read_text(errors="replace")
            record["cases"][log] = {"exit_status": status, "says": said if status else said[-200:]}
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
    """Ten epochs of the published recipe, in several ways."""
    record["runs"] = {}
    for run in RUNS:
        result = FOLDER / f"train, {run}.json"
        result.unlink(missing_ok=True)
        status = work.python(f"train, {run}", "-m", "benchmarks.gpu_train", run, FOLDER / "glands", result)
        note_end(record, status, f"train, {run}")
        record["runs"][run] = json.loads(read(result) or "null")
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

# ------------------------------------------------------------------------------------------------------------ results


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> list[Record]:
    """What benchmarks/gpu_lines.py has written; a kill may leave the last line unfinished."""
    return [json.loads(line) for line in read(path).split("\n")[:-1]]


def summarize(lines: Sequence[Record]) -> Record:
    """Tests by their outcome, the first where there are several, and what was measured."""
    outcomes: dict[str, Record] = {"passed": {}, "failed": {}, "skipped": {}, "started": {}}
    for line in lines:
        outcomes[line["outcome"]].setdefault(line["test"], line.get("message"))
    ended = outcomes["passed"] | outcomes["failed"] | outcomes["skipped"]
    summary = {"passed": len(outcomes["passed"]), "failed": outcomes["failed"], "skipped": outcomes["skipped"]}
    summary["unfinished"] = [test for test in outcomes["started"] if test not in ended]  # its process ended in it
    measured = [line["benchmark"] for line in lines if "benchmark" in line]
    return summary | ({"benchmarks": measured} if measured else {})


def describe_machine(digest: str) -> Record:
    import torch
    import triton

    return {
        "commit": commit(),
        "sources": digest,
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """The hash, with -dirty where files differ from it; None where git or the repository is missing."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def digest_of(paths: Sequence[str]) -> str:
    """Of the contents of files and folders below the root."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted((ROOT / path).rglob("*")) if (ROOT / path).is_dir() else [ROOT / path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_machine() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    places = (None, sysconfig.get_path("scripts"))
    missing += [tool for tool in TOOLS if not any(shutil.which(tool, path=place) for place in places)]
    if "torch" in missing:
        refuse(f"{sys.executable} has no PyTorch: choose another, as in make gpu-check PYTHON=/path/to/python")
    import torch

    if not torch.cuda.is_available():
        refuse(f"no CUDA GPU was found by PyTorch {torch.__version__}: make gpu-check needs one; make test does not")
    if missing:
        refuse(f"{sys.executable} lacks {', '.join(missing)}: install them first, nothing is downloaded here")


def refuse(reason: str) -> NoReturn:
    raise SystemExit(f"error: {reason}")


# ---------------------------------------------------------------------------------------------------------- the whole


class Check:
    """The stages of one command, and the file that they are summed up in."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.minutes = out, minutes
        self.digest = digest_of(BUILT_FROM)
        machine = describe_machine(self.digest)
        earlier = json.loads(read(out) or "{}")
        stages = earlier["stages"] if earlier.get("machine") == machine else {}
        self.result: Record = {"machine": machine, "stages": stages}
        self.arch = "".join(map(str, machine["capability"]))

    def run(self, stage: str) -> bool:
        """Run a stage, ahead of it the build where there is none of these sources; whether it did all, and well."""
        until = time.monotonic() + 60 * self.minutes
        if stage != "build" and read(FOLDER / BUILT) != self.digest:
            self._run("build", until)
            if read(FOLDER / BUILT) != self.digest:
                print(f"{stage}: not run, as nothing could be built")
                return False
        return self._run(stage, until)

    def _run(self, stage: str, until: float) -> bool:
        print(f"{stage}: its logs are in {FOLDER}", flush=True)
        record: Record = {"status": UNFINISHED, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}
        if stage in ("ops", "step", "train") and "tests" in self.result["stages"]:
            record["failed_tests_beside"] = len(self.result["stages"]["tests"].get("failed", {}))
        self.result["stages"][stage] = record
        start = time.monotonic()
        try:
            STAGES[stage](Work(until, self.arch, self.digest), record)
        except Exception as error:  # a result of this stage; the others are still worth having
            record["status"] = f"failed: {error!r}"
        finally:
            record["seconds"] = round(time.monotonic() - start, 1)
            self.write()
            print(f"{stage}: {say(record)}", flush=True)
        return record["status"] == "passed" or record["status"].startswith("skipped")

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(f"{self.out.name}.part")
        part.write_text(json.dumps(self.result, indent=2) + "\n")
        part.replace(self.out)


def say(record: Record) -> str:
    """A record in a few lines."""
    counts = [f"{record['passed']} passed", f"{len(record['failed'])} failed"] if "passed" in record else []
    counts += [f"{record['failed_tests_beside']} failed tests beside"] if record.get("failed_tests_beside") else []
    head = ", ".join([record["status"], *counts, f"{record['seconds']:.0f} s"])
    return "\n  ".join([head, *[*record.get("failed", {}), *record.get("unfinished", [])][:20]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; by default all, in turn")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which a stage is ended (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write, or a folder for gpu_check.json")
    given = parser.parse_args(arguments)
    if unknown := [stage for stage in given.stages if stage not in STAGES]:
        refuse(f"{unknown[0]} is no stage: choose from {', '.join(STAGES)}")
    out = given.out / OUT.name if given.out.is_dir() else given.out
    check_machine()
    FOLDER.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: refuse("ended by SIGTERM"))  # so that it is an exception, too
    check = Check(out, given.minutes)
    good = [check.run(stage) for stage in given.stages or STAGES]
    print(f"wrote {out}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
