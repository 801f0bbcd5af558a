"""Means over the seeds of finished runs: `python -m benchmarks.peers.collect RUNS --out results/accuracy/X.json`.

All runs of a folder must be of the same data and arguments but for method, seed and learning rate. Object scores are
means over the images at threshold 0.5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from semimoe_fast.errors import UserError, run_command

from .methods import METHODS

Run = dict[str, Any]
SCORES: dict[str, tuple[str, str, str]] = {  # column: variant, score, format
    "Dice": ("at_half", "dice", ".4f"),
    "Jaccard": ("at_half", "jaccard", ".4f"),
    "swept Dice": ("swept", "dice", ".4f"),
    "swept Jaccard": ("swept", "jaccard", ".4f"),
    "object F1": ("at_half", "object_f1", ".3f"),
    "object Dice": ("at_half", "object_dice", ".3f"),
    "object Hausdorff": ("at_half", "object_hausdorff", ".1f"),
}
BASE = "semi-moe"  # whose time is 1


def read_runs(folder: Path) -> list[Run]:
    """The finished runs of a folder, by method and learning rate. Raises UserError for none, and for unlike runs."""
    runs = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not runs:
        raise UserError(f"{folder} has no finished run: give the --out of `python -m benchmarks.peers`")
    first = next(iter(runs))
    for path, run in runs.items():
        for part in protocol(run).items() ^ protocol(runs[first]).items():
            raise UserError(f"{path} has another {part[0]} than {first}: keep such runs in another folder")
    return sorted(runs.values(), key=group)


def protocol(run: Run) -> dict[str, Any]:
    """What runs of one table have in common."""
    arguments = {name: value for name, value in run["arguments"].items() if name != "lr"}
    return arguments | {f"{part} part": str(images) for part, images in run["splits"].items()}


def group(run: Run) -> tuple[int, float]:
    """Runs with the same one differ in the seed only."""
    return [*METHODS].index(run["method"]), run["arguments"]["lr"]


def spread(values: Sequence[float | None], form: str) -> str | None:
    """Mean and sample standard deviation of the seeds; None if a seed has no value."""
    if None in values:
        return None
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def tables(runs: Sequence[Run]) -> dict[str, Any]:
    groups = [[*members] for _, members in itertools.groupby(runs, group)]
    base = [run["seconds_per_step"] for run in runs if run["method"] == BASE]

    def rows(cells: Callable[[Sequence[Run]], list[Any]]) -> list[list[Any]]:
        return [[members[0]["method"], *cells(members)] for members in groups]

    def scores(members: Sequence[Run]) -> list[Any]:
        values = {
            name: [run["scores"][variant][score] for run in members] for name, (variant, score, _) in SCORES.items()
        }
        return [
            members[0]["arguments"]["lr"],
            len(members),
            *(spread(values[name], SCORES[name][2]) for name in SCORES),
        ]

    def cost(members: Sequence[Run]) -> list[Any]:
        seconds = statistics.mean(run["seconds_per_step"] for run in members)
        relative = round(seconds / statistics.mean(base), 2) if base else None
        return [
            members[0]["steps"],
            members[0]["images_per_step"],
            members[0]["parameters"],
            round(seconds, 3),
            relative,
        ]

    splits = runs[0]["splits"].items()
    return {
        "scores": {"columns": ["method", "--lr", "seeds", *SCORES], "rows": rows(scores)},
        "cost": {
            "columns": ["method", "steps", "images a step", "trained parameters", "s a step", f"of {BASE}'s"],
            "rows": rows(cost),
        },
        "runs": {
            "columns": ["method", "seed", "--lr", "Dice", "swept Dice", "threshold", "commit"],
            "rows": [
                [
                    run["method"], run["seed"], run["arguments"]["lr"], round(run["scores"]["at_half"]["dice"], 4),
                    round(run["scores"]["swept"]["dice"], 4), run["scores"]["swept"]["threshold"], run["commit"],
                ]
                for run in runs
            ],
        },
        "splits": {
            "columns": ["part", "images", "SHA-256 of the names"],
            "rows": [[part, images["images"], images["names_sha256"]] for part, images in splits],
        },
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.collect", description=__doc__.partition(":")[0])
    parser.add_argument("runs", type=Path, help="folder of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(arguments)
    runs = read_runs(given.runs)
    about = {name: " and ".join(sorted({str(run[name]) for run in runs})) for name in ("machine", "commit")}
    a = runs[0]["arguments"]
    command = (
        f"python -m benchmarks.peers --data DATA --epochs {a['epochs']} --width {a['width']} "
        f"--image-size {a['image_size']} --normalization {a['normalization']} --out RUNS"
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_record(given.out, about["machine"], about["commit"], [command], tables(runs))


if __name__ == "__main__":
    run_command(main)
