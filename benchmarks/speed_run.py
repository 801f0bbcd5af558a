"""The speed run: the least wall time in which Semi-MoE learns GlaS to a Dice of 0.88. docs/accuracy.md has its rules.

    python -m benchmarks.speed_run --data GlaS256 --change "what is new"

GlaS256 is what `python -m benchmarks.glas256` lays out. A record adds a row to speed_run.json and leaves its log beside
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, commit, machine, short, write_record
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.files import write_atomically, write_text
from semimoe_fast.training.config import CONFIG_FILE
from semimoe_fast.training.run_folder import METRICS_FILE

TARGET = 0.88  # mean Dice of the seeds on `val` after the last epoch, at threshold 0.5
SEEDS = 0, 1, 2
THREADS = 2
RECIPE = (
    "--recipe strong --width 8 --labeled-batch 4 --epochs 32 --warmup-epochs 3 --val-every 32 "
    "--lr 0.03 --scale-jitter 1.5 --precision bf16"
)
RULES = (  # after the recipe: of an option given twice, the last counts
    f"--labeled train_all_85 --unlabeled none --val val --image-size 128 --device cpu --threads {THREADS}"
)
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
HISTORY = "speed_run.json"
COLUMNS = ["record", "seconds", "Dice", "lowest Dice", "change", "machine", "commit", "date"]
KEPT = "epoch", "lr", "total", "val"  # of the metrics of an epoch, in the log

Row = dict[str, Any]  # of the history, by column


@dataclasses.dataclass(frozen=True)
class Timed:
    """A training, timed from the start of its process to the end."""

    seconds: float
    config: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def dice(self) -> float:
        return self.epochs[-1]["val"]["gated"]["dice"]


def options(seed: int | str) -> str:
    return f"{RECIPE} {RULES} --seed {seed}"


def train(data: Path, seed: int) -> Timed:
    """Train in an empty folder, which makes the process decode the images. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        paths = ["--data", str(data), "--out", str(folder)]
        command = [sys.executable, "-m", "semimoe_fast.train", *paths, *options(seed).split()]
        started = time.perf_counter()
        status = subprocess.run(command, check=False).returncode
        seconds = time.perf_counter() - started
        if status:
            raise UserError(f"the training with seed {seed} ended with status {status}: see its message above")
        epochs = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        timed = Timed(seconds, json.loads((folder / CONFIG_FILE).read_text()), epochs)
    print(f"seed {seed}: {seconds:.1f} s, Dice {timed.dice:.4f}", flush=True)
    return timed


def read_history(path: Path) -> list[Row]:
    """The records so far. Raises UserError for a file that is none."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["tables"]["history"]["rows"]
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no history of speed runs: restore it with git, or give another --out") from error


def require_record(runs: Mapping[int, Timed], rivals: Sequence[float]) -> None:
    """Raise UserError unless the runs reach the target in less time than the rivals, in seconds."""
    seconds, dice = means(runs)
    if dice < TARGET:
        raise UserError(f"no record: the mean Dice is {dice:.6f}, below {TARGET}")
    if seconds >= min(rivals, default=float("inf")):
        raise UserError(f"no record: {seconds:.1f} s, and this machine has one of {min(rivals)} s")


def means(runs: Mapping[int, Timed]) -> tuple[float, float]:
    """Seconds and Dice."""
    return statistics.mean(run.seconds for run in runs.values()), statistics.mean(run.dice for run in runs.values())


def log(runs: Mapping[int, Timed], origin: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines: where it ran; then of each seed the configuration, the epochs, and the time with the Dice."""
    yield origin | {"command": f"python -m semimoe_fast.train --data GlaS256 {options('SEED')}"}
    for seed, run in runs.items():
        yield {"seed": seed, "config": run.config | {"data": "GlaS256", "out": None}}
        yield from ({"seed": seed} | {key: epoch[key] for key in KEPT if key in epoch} for epoch in run.epochs)
        yield {"seed": seed, "seconds": run.seconds, "dice": run.dice}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train_all_85 and val")
    parser.add_argument("--change", required=True, help="what is new, for the table")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {HISTORY} and the logs")
    given = parser.parse_args(arguments)

    origin = {"machine": machine(THREADS), "torch": version("torch"), "commit": commit()}
    if len(origin["commit"] or "") != 40:  # none, or -dirty
        raise UserError(
            f"the code is that of commit {short(origin['commit'])}: commit it first, so that others can repeat it"
        )
    if "|" in given.change or not given.change.isprintable():
        raise UserError(f"--change is {given.change!r}: give one line without |, for a table")
    given.out.mkdir(parents=True, exist_ok=True)
    history = read_history(given.out / HISTORY)

    runs = {seed: train(given.data, seed) for seed in SEEDS}
    require_record(runs, [row["seconds"] for row in history if row["machine"] == origin["machine"]])
    seconds, dice = means(runs)
    lowest = min(run.dice for run in runs.values())
    number, today = len(history) + 1, str(datetime.date.today())
    values = [number, round(seconds, 1), round(dice, 4), round(lowest, 4), given.change, origin["machine"]]
    history.append(dict(zip(COLUMNS, [*values, short(origin["commit"]), today], strict=True)))
    text = "".join(json.dumps(line) + "\n" for line in log(runs, origin))
    write_text(given.out / f"speed_run_{number}.jsonl", text)
    machines, commits = (" and ".join(sorted({row[name] for row in history})) for name in ("machine", "commit"))
    command = f"python -m benchmarks.speed_run --data GlaS256 --change {shlex.quote(given.change)}"
    tables = {"history": {"columns": COLUMNS, "rows": [list(row.values()) for row in history]}}
    write_atomically(given.out / HISTORY, lambda part: write_record(part, machines, commits, [command], tables))


if __name__ == "__main__":
    run_command(main)
