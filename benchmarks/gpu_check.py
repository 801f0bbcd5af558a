"""`make gpu-check`: check and measure this project on a machine with a CUDA GPU, stage by stage, into one JSON file.

    python benchmarks/gpu_check.py [build] [tests] [sanitize] [ops] [step] [train] [--minutes N] [--out FILE]

Uses the Python that runs it and its PyTorch, and no network. A time limit ends each stage, so each runs its most
important parts first. The file is written during and after each stage, and also when the process gets SIGTERM. It keeps
the stages of earlier commands if the machine, the sources and the tests are the same. The package is built into
build/gpu, where the logs are too.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_stages
from benchmarks.gpu_stages import BUILT, NEEDS, OLDEST, ROOT, STAGES, TOOLS, UNFINISHED, Record, Work, read
from benchmarks.record import commit

OUT = ROOT / "benchmarks" / "results" / "gpu_check.json"
BUILT_FROM = ("csrc", "kernels", "semimoe_fast", "CMakeLists.txt", "pyproject.toml", "setup.py")
CHECKED_BY = ("tests", "benchmarks")
MINUTES = 9.0


def read_lines(path: Path) -> list[Record]:
    """The lines that benchmarks/gpu_lines.py wrote, but not an unfinished last line, which a kill can leave."""
    return [json.loads(line) for line in read(path).split("\n")[:-1]]


def summarize(lines: Sequence[Record]) -> Record:
    """Tests by outcome (the first outcome of a test counts), and the results of the benchmarks."""
    outcomes: dict[str, Record] = {"passed": {}, "failed": {}, "skipped": {}, "started": {}}
    for line in lines:
        outcomes[line["outcome"]].setdefault(line["test"], line.get("message"))
    ended = outcomes["passed"] | outcomes["failed"] | outcomes["skipped"]
    summary = {"passed": len(outcomes["passed"]), "failed": outcomes["failed"], "skipped": outcomes["skipped"]}
    summary["unfinished"] = [test for test in outcomes["started"] if test not in ended]  # the process ended in them
    measured = [line["benchmark"] for line in lines if "benchmark" in line]
    return summary | ({"benchmarks": measured} if measured else {})


def describe_machine() -> Record:
    """What must be the same for the file to keep the stages of an earlier command."""
    import torch

    return {
        "sources": digest_of(BUILT_FROM),
        "tests": digest_of(CHECKED_BY),
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def digest_of(paths: Sequence[str]) -> str:
    """A digest of the files at or below paths of the root, without benchmarks/results, which this program writes."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted((ROOT / path).rglob("*")) if (ROOT / path).is_dir() else [ROOT / path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and OUT.parent not in file.parents:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def missing(stage: str) -> list[str]:
    """The modules and tools that a stage needs and this Python lacks."""

    def is_there(name: str) -> bool:
        if name in TOOLS:
            return any(shutil.which(name, path=place) for place in (None, sysconfig.get_path("scripts")))
        oldest = OLDEST.get(name, 0)
        return importlib.util.find_spec(name) is not None and (not oldest or int(version(name).split(".")[0]) >= oldest)

    return [f"{name} {OLDEST.get(name, '')}".strip() for name in NEEDS[stage] if not is_there(name)]


def check_machine() -> None:
    if importlib.util.find_spec("torch") is None:
        refuse(f"{sys.executable} has no PyTorch: choose another, as in make gpu-check PYTHON=/path/to/python")
    import torch

    if not torch.cuda.is_available():
        refuse(f"no CUDA GPU was found by PyTorch {torch.__version__}: make gpu-check needs one; make test does not")


def refuse(reason: str) -> NoReturn:
    raise SystemExit(f"error: {reason}")


def earlier_stages(path: Path, machine: Record) -> Record:
    """The stages in an earlier result file, if they are of the same machine, sources and tests."""
    text = read(path)
    if not text:
        return {}
    try:
        earlier = json.loads(text)
    except ValueError:
        earlier = None
    stages = earlier.get("stages") if isinstance(earlier, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(record, dict) for record in stages.values()):
        print(f"{path} is not a result file of gpu-check: this command replaces it")
        return {}
    return stages if earlier.get("machine") == machine else {}


class Check:
    """The stages of one command, and their result file."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.minutes = out, minutes
        machine = describe_machine()
        self.commit = commit()
        self.result: Record = {"machine": machine, "stages": earlier_stages(out, machine)}
        self.arch = "".join(map(str, machine["capability"]))
        self.build = f"{machine['sources']} for {self.arch} and {sys.implementation.cache_tag}"
        self.current: Record = {}  # the record of the stage that runs

    def run(self, stage: str) -> bool:
        """Run a stage, and the build before it unless these sources are built; return whether it succeeded."""
        until = time.monotonic() + 60 * self.minutes
        if stage != "build" and not self.is_built():
            self._run("build", until)
            if not self.is_built():
                print(f"{stage}: not run, because the build failed or was skipped")
                return False
        return self._run(stage, until)

    def is_built(self) -> bool:
        return read(gpu_stages.FOLDER / BUILT) == self.build

    def _run(self, stage: str, until: float) -> bool:
        print(f"{stage}: its logs are in {gpu_stages.FOLDER}", flush=True)
        record: Record = {"status": UNFINISHED, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}
        record["commit"] = self.commit
        if stage in ("ops", "step", "train") and "tests" in self.result["stages"]:
            record["failed_tests_beside"] = len(self.result["stages"]["tests"].get("failed", {}))
        self.result["stages"][stage] = self.current = record
        self.write()
        start = time.monotonic()
        lacking = missing(stage)
        try:
            if lacking:
                record["status"] = f"skipped: {sys.executable} lacks {', '.join(lacking)}: install them first"
            else:
                STAGES[stage](Work(until, self.arch, self.build, self.write), record)
        except Exception as error:  # recorded as the result of this stage, so that the next stages still run
            record["status"] = f"failed: {error!r}"
        finally:
            record["seconds"] = round(time.monotonic() - start, 1)
            self.write()
            print(f"{stage}: {describe(record)}", flush=True)
        return not lacking and (record["status"] == "passed" or record["status"].startswith("skipped"))

    def write(self) -> None:
        """Write the result file, with what the tests of the current stage have recorded so far."""
        if "lines" in self.current:
            self.current |= summarize(read_lines(gpu_stages.FOLDER / self.current["lines"]))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(f"{self.out.name}.part")
        part.write_text(json.dumps(self.result, indent=2) + "\n")
        part.replace(self.out)

    def terminate(self, *_: object) -> NoReturn:
        """Handle SIGTERM. The file comes first: who sends SIGTERM may send SIGKILL before the stage has ended."""
        self.write()
        refuse("ended by SIGTERM")


def describe(record: Record) -> str:
    """A record in a few lines."""
    counts = [f"{record['passed']} passed", f"{len(record['failed'])} failed"] if "passed" in record else []
    counts += [f"{record['failed_tests_beside']} failed tests beside"] if record.get("failed_tests_beside") else []
    head = ", ".join([record["status"], *counts, f"{record['seconds']:.0f} s"])
    return "\n  ".join([head, *[*record.get("failed", {}), *record.get("unfinished", [])][:20]])


def positive_minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive, finite number of minutes")
    return minutes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"one of {', '.join(STAGES)} (default: all)")
    parser.add_argument(
        "--minutes", type=positive_minutes, default=MINUTES, help="time limit of each stage in minutes (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write, or a folder for gpu_check.json")
    given = parser.parse_intermixed_args(arguments)
    if unknown := [stage for stage in given.stages if stage not in STAGES]:
        refuse(f"{unknown[0]} is no stage: choose from {', '.join(STAGES)}")
    out = given.out / OUT.name if given.out.is_dir() else given.out
    check_machine()
    gpu_stages.FOLDER.mkdir(parents=True, exist_ok=True)
    check = Check(out, given.minutes)
    signal.signal(signal.SIGTERM, check.terminate)
    succeeded = [check.run(stage) for stage in given.stages or STAGES]
    print(f"wrote {out}")
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
