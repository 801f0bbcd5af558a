"""`make gpu-check`: the tests and benchmarks on a machine with a CUDA GPU, summed up in one JSON file.

Uses the Python it is started with and the PyTorch installed there, and no network: the package is built into a
temporary folder, and the tests run against that. Benchmarks are not run where a test fails, nor beside peers that are
not installed. The file is written whatever happens, with what is known by then.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What building, testing and measuring import, by module name, but for the benchmarks' peers.
NEEDED = """torch triton numpy PIL matplotlib safetensors tqdm tyro pytest pytest_benchmark hypothesis scipy skimage
            setuptools pybind11 cmake ninja""".split()


def refuse(reason: str) -> None:
    raise SystemExit(f"error: {reason}")


def check_machine() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "torch" in missing:
        refuse(f"{sys.executable} has no PyTorch: choose another, as in make gpu-check PYTHON=/path/to/python")
    import torch

    if not torch.cuda.is_available():
        refuse(f"no CUDA GPU was found by PyTorch {torch.__version__}: make gpu-check needs one; make test does not")
    if missing:
        refuse(f"{sys.executable} lacks {', '.join(missing)}: install them first, nothing is downloaded here")


def describe_machine() -> dict[str, Any]:
    import torch
    import triton

    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # the hash, perhaps with -dirty
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
    }


def install(folder: Path) -> dict[str, str]:
    """Build the package into a folder; the environment in which Python finds it there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", folder, ROOT], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def built_with(environment: dict[str, str]) -> dict[str, Any]:
    program = "import json, _semimoe_fast; print(json.dumps(_semimoe_fast.built_with))"
    return json.loads(subprocess.check_output([sys.executable, "-P", "-c", program], env=environment))


def pytest(environment: dict[str, str], *arguments: str | Path) -> int:
    """Run pytest from the root, which -P keeps off the path, so that the built package is the one under test."""
    command = [sys.executable, "-P", "-m", "pytest", "-m", "not network", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def summarize_tests(report: Path) -> dict[str, Any]:
    """Empty where pytest did not live to write the report."""
    if not report.is_file():
        return {}
    cases = ET.parse(report).getroot().findall(".//testcase")

    def with_outcome(outcome: str) -> list[str]:
        found = [(case, case.find(outcome)) for case in cases]
        return [f"{c.get('classname')}::{c.get('name')}: {o.get('message')}" for c, o in found if o is not None]

    failed, skipped = with_outcome("failure") + with_outcome("error"), with_outcome("skipped")
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": failed, "skipped": skipped}


def summarize_benchmarks(report: Path) -> list[dict[str, Any]]:
    """As pytest-benchmark has them, shortened; none where pytest did not live to write the report it has opened."""
    text = report.read_text() if report.is_file() else ""
    kept = ("min", "median", "iqr", "rounds")
    return [
        {key: one[key] for key in ("name", "group", "params", "extra_info")}
        | {"stats": {key: one["stats"][key] for key in kept}}
        for one in json.loads(text or '{"benchmarks": []}')["benchmarks"]
    ]


def test_and_measure(result: dict[str, Any]) -> int:
    """Fill in the result; the exit status of the first pytest that was not content, or 0."""
    with tempfile.TemporaryDirectory(prefix="semimoe_fast-") as temporary:
        folder = Path(temporary)
        environment = install(folder / "site")
        result["native"] = built_with(environment)
        # The packaging tests install the tree into environments of their own, which says nothing about the GPU.
        tests = ["tests", "--ignore=tests/test_packaging.py", f"--junitxml={folder / 'tests.xml'}"]
        status = pytest(environment, *tests)
        result["tests"] = {"exit_status": status, **summarize_tests(folder / "tests.xml")}
        if status == 0:
            timings = folder / "timings.json"
            status = pytest(environment, "benchmarks", "--benchmark-only", f"--benchmark-json={timings}")
            result["benchmark_exit_status"] = status
            result["benchmarks"] = summarize_benchmarks(timings)
        return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or a folder for gpu_check.json")
    out = parser.parse_args().out
    if out.is_dir():
        out /= "gpu_check.json"
    check_machine()
    out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: refuse("ended by SIGTERM"))  # so that a time limit is an exception
    result = {"machine": describe_machine()}
    try:
        return test_and_measure(result)
    except BaseException as error:
        result["error"] = repr(error)
        raise
    finally:
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
