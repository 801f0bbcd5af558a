"""Measure speed once more for the pages of results: `make results`, or only some: `make results ARGS="targets step"`.

A page is a command, and how its output becomes the tables of benchmarks/results/NAME.json. Let nothing else run: the
record has the share of the processors that other programs took, but not what other guests of the same host did to a
virtual machine. All pages together take about half an hour. Afterwards, read the sentences beside the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semimoe_fast.errors import UserError, run_command
from semimoe_fast.ops import _native

from . import plot_targets
from .record import ROOT, commit, counted, machine, short, write_record

RESULTS = ROOT / "benchmarks" / "results"
STAT = Path("/proc/stat")
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "10000"}  # the pages are of a CPU

Table = dict[str, Any]


class Output(NamedTuple):
    text: str
    benchmarks: list[dict[str, Any]]  # as pytest-benchmark writes them


class Page(NamedTuple):
    command: str  # after `python -m`
    threads: int
    tables: Callable[[Output], dict[str, Table]]
    packages: tuple[str, ...] = ("torch",)


# ------------------------------------------------------------------------------------------------- pytest's benchmarks


def pivot(title: str, cells: Iterable[tuple[str, str, float]], **more: Any) -> Table:
    """A table of (row, column, value), in the order of their names' first appearance; values have three digits."""
    values = {(row, column): float(f"{value:.3g}") for row, column, value in cells}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*values, strict=True))
    return {
        "columns": [title, *columns],
        "rows": [[row, *(values.get((row, c)) for c in columns)] for row in rows],
    } | more


def targets(output: Output) -> dict[str, Table]:
    timings = plot_targets.read(output.benchmarks)

    def table(title: str, test: str) -> Table:
        timed = [t for t in timings if t.test == test]
        floors = [(f"copy of 6 bytes, {t.device}", t.column, t.floor) for t in timed]
        return pivot(title, [*((t.row, t.column, t.ns) for t in timed), *floors], relative_to=timed[0].row)

    threads = pivot(
        "threads, batch x side x side", [(t.row, t.column, t.ns) for t in timings if t.test == "test_threads"]
    )
    one, two = (row[1:] for row in threads["rows"])
    threads["rows"].append(["two threads, times as fast", *(f"{a / b:.2f}" for a, b in zip(one, two, strict=True))])
    plot_targets.draw(timings, RESULTS / "targets.png")
    return {
        "glands": table("gland masks, batch x side x side", "test_glands"),
        "worst": table("worst masks, 2048 x 2048", "test_worst_masks"),
        "threads": threads,
    }


def instances(output: Output) -> dict[str, Table]:
    cells = []
    for benchmark in output.benchmarks:
        parameters, info = benchmark["params"], benchmark["extra_info"]
        column = f"{parameters['side']} x {parameters['side']}, {info['instances']}"
        cells.append((parameters["provider"], column, 1e9 * benchmark["stats"]["median"] / info["pixels"]))
    return {"maps": pivot("instance maps, side, instances", cells, relative_to=cells[0][0])}


def milliseconds(benchmark: dict[str, Any]) -> float:
    return 1e3 * benchmark["stats"]["median"]


def operations(output: Output) -> dict[str, Table]:
    """The fastest backend of each operation, beside the reference."""

    def table(test: str, ours: str, row: Callable[[dict[str, Any]], str]) -> Table:
        timed = [b for b in output.benchmarks if b["name"].startswith(test)]
        chosen = [
            b for name in (ours, "reference", "reference compiled") for b in timed if b["params"]["provider"] == name
        ]
        cells = [(row(b["params"]), b["params"]["provider"], milliseconds(b)) for b in chosen]
        return pivot("", cells, ratios={f"reference / {ours}": ["reference", ours]})

    def sets(parameters: dict[str, Any]) -> str:
        return f"{('one set', 'two sets')[parameters['sets'] - 1]} of predictions, B = {parameters['batch']}"

    return {
        "gating": table("test_multi_gate", "portable", lambda parameters: parameters["layout"]),
        "objective": table("test_objective_terms", "fused", sets),
    }


def batch_norm(output: Output) -> dict[str, Table]:
    names = {"ours, avx512": "AVX-512", "ours, avx2": "AVX2", "ours, plain": "plain", "torch": "torch"}
    cells = []
    for name, column in names.items():
        for benchmark in output.benchmarks:
            parameters = benchmark["params"]
            if parameters["peer"][1] == name:
                row = f"({', '.join(map(str, parameters['shape']))}), {counted(parameters['threads'], 'thread')}"
                cells.append((row, column, milliseconds(benchmark)))
    found = dict.fromkeys(column for _, column, _ in cells)
    ratios = {f"torch / {column}": ["torch", column] for column in ("AVX-512", "AVX2") if column in found}
    return {"batch_norm": pivot("shape", cells, ratios=ratios)}


def predict(output: Output) -> dict[str, Table]:
    names = {
        "eager": "eager, as PyTorch users write it",
        "as_trained": "eager, with the normalization of training",
        "compiled": "folded, torch.compile",
        "onnx_runtime": "folded, ONNX Runtime",
        "predict": "predict",
    }
    cells = []
    for benchmark in output.benchmarks:
        provider, width = re.search(r"\[(\w+)-(\d+)\]", benchmark["name"]).groups()
        cells.append((names[provider], f"width {width}", benchmark["extra_info"]["megapixels_per_second"]))
    return {"predict": pivot("network", cells, relative_to=names["eager"])}


# ------------------------------------------------------------------------------------------------------ printed tables


def printed(**tables: Table) -> Callable[[Output], dict[str, Table]]:
    """The Markdown tables that a command prints, under these names, with these additions."""

    def read(output: Output) -> dict[str, Table]:
        blocks = re.findall(r"(?:^\|.*\|\n)+", output.text, re.MULTILINE)
        found = {}
        for (name, more), block in zip(tables.items(), blocks, strict=True):
            columns, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
            found[name] = {"columns": columns, "rows": [[number(cell) for cell in row] for row in rows]} | more
        return found

    return read


def number(cell: str) -> str | float | None:
    try:
        return float(cell)
    except ValueError:
        return cell or None


def profile(output: Output) -> dict[str, Table]:
    rows = re.findall(r"^(\w[\w ]*?) +(\d+\.\d\d) +(\d+\.\d%)$", output.text, re.MULTILINE)
    if not rows:
        raise UserError("the profile has no table: the output above says why")
    return {
        "step": {
            "columns": ["part of a step", "ms", "share"],
            "rows": [[name, float(ms), share] for name, ms, share in rows],
        }
    }


PAGES = {
    "targets": Page(
        "pytest benchmarks/test_distance.py --benchmark-only --benchmark-max-time=0.5 --benchmark-min-rounds=3",
        1,
        targets,
        ("torch", "scipy", "scikit-image", "edt", "opencv-python-headless", "numba"),
    ),
    "instances": Page(
        "pytest benchmarks/test_instances.py --benchmark-only --benchmark-max-time=0.5 --benchmark-min-rounds=3",
        1,
        instances,
        ("torch", "scipy", "edt"),
    ),
    "operations": Page(
        "pytest benchmarks/test_gate.py benchmarks/test_objective.py -k 'both and cpu' --benchmark-only", 2, operations
    ),
    "batch_norm": Page(
        "pytest benchmarks/test_batch_norm.py -k 'channels-last and both and cpu' --benchmark-only", 1, batch_norm
    ),
    "predict": Page("pytest benchmarks/test_predict.py --benchmark-only", 1, predict, ("torch", "onnxruntime")),
    "step": Page("benchmarks.step_ratios --rounds 7", 2, printed(step={}, habits={"format": ".3f"})),
    "memory": Page("benchmarks.memory", 1, printed(kept={"format": ".3f"}, cost={})),
    "profile": Page(
        "semimoe_fast.train --profile --width 16 --image-size 128 --labeled-batch 2 --unlabeled-batch 2 --threads 2 "
        "--epochs 1 --steps-per-epoch 8 --out RUN",
        2,
        profile,
    ),
    "appearance": Page(
        "benchmarks.appearance",
        1,
        printed(
            changes={
                "ratios": {
                    "scikit-image / ours": ["scikit-image, ms", "ours, ms"],
                    "albumentations / ours": ["albumentations, ms", "ours, ms"],
                }
            },
            passes={},
        ),
        ("torch", "scikit-image", "albumentations"),
    ),
}


# ------------------------------------------------------------------------------------------------------------- running


def measure(name: str, commit: str) -> None:
    """Run the command of a page and write its file of results. Raises UserError if the command fails."""
    page = PAGES[name]
    variables = ENVIRONMENT | {"OMP_NUM_THREADS": str(page.threads)}
    command = " ".join([*(f"{key}={value}" for key, value in variables.items()), "python -m", page.command])
    print(f"{name}: {command}", flush=True)
    busy, own, start = busy_seconds(), own_seconds(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = run(page, variables, Path(folder))
    cores = os.cpu_count()
    others = (busy_seconds() - busy - own_seconds() + own) / (time.monotonic() - start) / cores
    place = (
        f"{cores} cores of {machine(page.threads)} unless the table says otherwise, {_native.instruction_set()}, "
        f"{max(0, others):.0%} taken by other programs"
    )
    write_record(RESULTS / f"{name}.json", place, commit, [command], page.tables(output), page.packages)


def busy_seconds() -> float:
    """Of all processors and programs since the system started."""
    user, nice, system, _idle, _waiting, *interrupts = map(int, STAT.read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(page: Page, variables: dict[str, str], folder: Path) -> Output:
    """Run a command, and show what it prints."""
    words = [str(folder / "run") if word == "RUN" else word for word in shlex.split(page.command)]
    words = [sys.executable, "-m", *words]
    file = folder / "benchmarks.json"
    if words[2] == "pytest":
        words.append(f"--benchmark-json={file}")
    lines = []
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise UserError(f"`{shlex.join(words[2:])}` ended with code {process.returncode}: its output above says why")
    benchmarks = json.loads(file.read_text())["benchmarks"] if file.exists() else []
    return Output("".join(lines), benchmarks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=[*PAGES], help=f"some of {', '.join(PAGES)}; by default all")
    names = parser.parse_args(arguments).pages
    for name in names:
        if name not in PAGES:
            raise UserError(f"{name} is no page: choose from {', '.join(PAGES)}")
    code = short(commit("benchmarks/results", "*.md"))  # which earlier pages have changed
    for name in names:
        measure(name, code)


if __name__ == "__main__":
    run_command(main)
