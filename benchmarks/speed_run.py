"""The speed run: the least wall time in which Semi-MoE learns GlaS to a Dice of 0.88. docs/accuracy.md has its rules.

    python -m benchmarks.speed_run --data GlaS85 --change "what is new"

GlaS85 is what `python -m semimoe_fast.prepare --labeled 85` lays out. A record adds a row to speed_run.json and
leaves its log beside it.
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
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, commit, write_record
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.training.config import CONFIG_FILE
from semimoe_fast.training.run_folder import METRICS_FILE

from .peers.__main__ import machine
from .peers.collect import commit_of

TARGET = 0.88  # mean Dice of the seeds on `val` after the last epoch, at threshold 0.5
SEEDS = 0, 1, 2
THREADS = 2
RECIPE = (
    "--recipe strong --width 8 --labeled-batch 4 --epochs 32 --warmup-epochs 3 --val-every 32 "
    "--lr 0.03 --scale-jitter 1.5"
)
RULES = f"--unlabeled none --image-size 128 --device cpu --threads {THREADS}"
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
KEPT = "epoch", "lr", "total", "val"  # of the metrics of an epoch, in the log
COLUMNS = ["record", "seconds", "Dice", "lowest Dice", "change", "machine", "commit", "date"]


@dataclasses.dataclass(frozen=True)
class Timed:
    """A training, timed from the start of its process to the end."""

    seconds: float
    config: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def dice(self) -> float:
        return self.epochs[-1]["val"]["gated"]["dice"]


def train(data: Path, seed: int) -> Timed:
    """Train in an empty folder, which makes the process decode the images. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        options = f"{RULES} {RECIPE} --seed {seed}".split()
        command = [sys.executable, "-m", "semimoe_fast.train", "--data", str(data), "--out", str(folder), *options]
        started = time.perf_counter()
        status = subprocess.run(command, check=False).returncode
        seconds = time.perf_counter() - started
        if status:
            raise UserError(f"seed {seed} failed with status {status}: mend what the message above says")
        epochs = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        return Timed(seconds, json.loads((folder / CONFIG_FILE).read_text()), epochs)


def log(runs: dict[int, Timed], origin: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines: where it ran; then of each seed the configuration, the epochs, and the time with the Dice."""
    yield origin | {"command": f"python -m semimoe_fast.train --data GlaS85 {RULES} {RECIPE} --seed SEED"}
    for seed, run in runs.items():
        yield {"seed": seed, "config": run.config | {"data": "GlaS85", "out": None}}
        yield from ({"seed": seed} | {key: epoch[key] for key in KEPT if key in epoch} for epoch in run.epochs)
        yield {"seed": seed, "seconds": run.seconds, "dice": run.dice}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train_sup_85 and val")
    parser.add_argument("--change", required=True, help="what is new, for the table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of speed_run.json and the logs")
    given = parser.parse_args(arguments)

    torch.set_num_threads(THREADS)  # for `machine` to name them
    origin = {"machine": machine(torch.device("cpu")), "torch": version("torch"), "commit": commit()}
    runs = {seed: train(given.data, seed) for seed in SEEDS}
    seconds = round(statistics.mean(run.seconds for run in runs.values()), 1)
    dice, lowest = (round(of(run.dice for run in runs.values()), 4) for of in (statistics.mean, min))
    print(f"{seconds} s, mean Dice {dice}, lowest {lowest}")
    if dice < TARGET:
        raise UserError(f"no record: the mean Dice is {dice}, below {TARGET}")

    history = given.out / "speed_run.json"
    rows = json.loads(history.read_text())["tables"]["history"]["rows"] if history.exists() else []
    number = len(rows) + 1
    row = [
        number,
        seconds,
        dice,
        lowest,
        given.change,
        origin["machine"],
        commit_of(origin),
        str(datetime.date.today()),
    ]
    (given.out / f"speed_run_{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log(runs, origin)))
    command = f"python -m benchmarks.speed_run --data GlaS85 --change {shlex.quote(given.change)}"
    tables = {"history": {"columns": COLUMNS, "rows": [*rows, row]}}
    write_record(history, origin["machine"], commit_of(origin), [command], tables)


if __name__ == "__main__":
    run_command(main)
