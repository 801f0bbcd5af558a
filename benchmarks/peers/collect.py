"""Means over runs: `python -m benchmarks.peers.collect RUNS --out benchmarks/results/accuracy/NAME.json`.

RUNS are the --out of `python -m benchmarks.peers`, of one folder of data each. Several of them are the folds of a
cross-validation. All runs have the same arguments but for method, seed and recipe.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import short, write_record
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
EQUAL = "image_size normalization width epochs labeled_batch unlabeled_batch device precision".split()  # in a table
UPPER_BOUND = "supervised-all"  # learns from the masks of the unlabeled images
PUBLISHED = "published"  # the recipe
BASE = "semi-moe"  # with which costs are compared


def read_runs(folders: Sequence[Path]) -> dict[Path, list[Run]]:
    """The finished runs of each folder. Raises UserError for none, and for unlike runs."""
    runs = {path: json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))}
    found = {folder: [run for path, run in runs.items() if path.parent == folder] for folder in folders}
    for folder, members in found.items():
        if not members:
            raise UserError(f"{folder} has no finished run: give the --out of `python -m benchmarks.peers`")
    first = next(iter(runs))
    alike: dict[str, Path] = {}  # the first run with each name and learning rate
    for path, run in runs.items():
        if "origins" not in run:
            raise UserError(f"{path} is of an older version: train it again in another folder")
        _require_same(path, run, first, runs[first], EQUAL)
        other = alike.setdefault(f"{name_of(run)} {run['arguments']['lr']}", path)
        _require_same(path, run, other, runs[other], run["arguments"].keys() | runs[other]["arguments"].keys())
        if run["splits"] != found[path.parent][0]["splits"]:
            raise UserError(f"{path} has other images than the first run beside it: keep such runs in other folders")
    return found


def _require_same(path: Path, run: Run, other_path: Path, other: Run, names: Iterable[str]) -> None:
    for name in names:
        if run["arguments"].get(name) != other["arguments"].get(name):
            raise UserError(f"{path} has another {name} than {other_path}: keep such runs in other folders")


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ in seed or fold. The published recipe comes first, then the whole other one."""

    def group(run: Run) -> tuple[Any, ...]:
        recipe = recipe_of(run)
        return recipe != PUBLISHED, recipe, [*METHODS].index(run["method"]), run["arguments"]["lr"]

    return [[*members] for _, members in itertools.groupby(sorted(runs, key=group), group)]


def recipe_of(run: Run) -> str:
    return run["arguments"].get("recipe", PUBLISHED)


def name_of(run: Run) -> str:
    """The method, and its recipe unless that is the published one."""
    return run["method"] if recipe_of(run) == PUBLISHED else f"{run['method']}, {recipe_of(run)}"


def spread(values: Sequence[float | None], form: str) -> str | None:
    """Mean and sample standard deviation; None if a run has no value."""
    if None in values:
        return None
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def tables(found: dict[Path, list[Run]]) -> dict[str, Any]:
    groups = grouped([run for members in found.values() for run in members])

    def scores(members: Sequence[Run], of: str) -> list[Any]:
        values = [[run[of][variant][score] for run in members] for variant, score, _ in SCORES.values()]
        forms = [form for *_, form in SCORES.values()]
        return [members[0]["arguments"]["lr"], len(members), *map(spread, values, forms)]

    def cost(members: Sequence[Run]) -> list[Any]:
        steps = sum(run["steps"] for run in members)
        seconds = [round(sum(run[name] for run in members) / steps, 3) for name in ("seconds", "cpu_seconds")]
        return [members[0]["parameters"], *seconds]

    return {
        **{
            table: {
                "columns": ["method", "--lr", "runs", *SCORES],
                "rows": [[name_of(members[0]), *scores(members, table)] for members in groups],
            }
            for table in ("scores", "scores_with_tta")
        },
        "unlabeled": {
            "columns": ["method", "--lr", "runs", "Dice of the unlabeled images"],
            "rows": [
                [
                    name_of(members[0]),
                    members[0]["arguments"]["lr"],
                    len(members),
                    spread(last_unlabeled(members), ".4f"),
                ]
                for members in groups
                if members[0]["method"] != UPPER_BOUND
            ],
        },
        "cost": {
            "columns": ["method", "trained parameters", "s a step", "CPU s a step"],
            "rows": [[name_of(members[0]), *cost(members)] for members in groups],
            "relative_to": BASE,
        },
        "runs": {
            "columns": ["data", "method", "seed", "--lr", "Dice", "swept Dice", "threshold", "commit"],
            "rows": [[folder.name, *scores_of(run)] for folder, members in found.items() for run in members],
        },
        "experts": {  # after the last epoch
            "columns": ["data", "method", "seed", "--lr", "dead channels", "loss weights", "gates of the mask"],
            "rows": [
                [folder.name, *experts_of(run)]
                for folder, members in found.items()
                for run in members
                if "dead_channels" in run["curve"][-1]
            ],
        },
        "splits": {
            "columns": ["data", "part", "images", "SHA-256 of the names", "of the files"],
            "rows": [
                [folder.name, part, images["images"], images["names_sha256"], images["files_sha256"]]
                for folder, members in found.items()
                for part, images in members[0]["splits"].items()
            ],
        },
    }


def last_unlabeled(members: Sequence[Run]) -> list[float | None]:
    """Dice of the unlabeled images after the last epoch of each run; None if they had no masks."""
    return [run["curve"][-1].get("unlabeled_dice") for run in members]


def scores_of(run: Run) -> list[Any]:
    half, swept = run["scores"]["at_half"], run["scores"]["swept"]
    dice = [round(half["dice"], 4), round(swept["dice"], 4), swept["threshold"]]
    return [name_of(run), run["seed"], run["arguments"]["lr"], *dice, commits_of([run])]


def experts_of(run: Run) -> list[Any]:
    end = run["curve"][-1]
    values = end["dead_channels"], end["loss_weights"], end["gate_weights"][0]
    return [name_of(run), run["seed"], run["arguments"]["lr"], *(" ".join(f"{x:.3g}" for x in v) for v in values)]


def commits_of(runs: Sequence[Run]) -> str:
    return " and ".join(sorted({short(origin["commit"]) for run in runs for origin in run["origins"]}))


def commands(runs: Sequence[Run]) -> list[str]:
    """The commands that train the runs, one for each recipe, learning rate and choice of seeds."""
    options = "epochs width image_size normalization device".split()
    common = " ".join(f"--{name.replace('_', '-')} {runs[0]['arguments'][name]}" for name in options)
    seeds: dict[tuple[str, float, str], set[int]] = {}
    for run in runs:
        seeds.setdefault((recipe_of(run), run["arguments"]["lr"], run["method"]), set()).add(run["seed"])
    methods: dict[tuple[str, float, tuple[int, ...]], list[str]] = {}
    for (recipe, lr, method), used in seeds.items():
        methods.setdefault((recipe, lr, tuple(sorted(used))), []).append(method)
    lines = []
    for (recipe, lr, used), names in methods.items():
        name, _, left_out = recipe.partition(" without ")
        words = ["python -m benchmarks.peers --data DATA --out RUNS", common, "--recipe", name]
        words += ["--without", *left_out.split(", ")] if left_out else []
        lines.append(" ".join([*words, "--lr", str(lr), "--method", *names, "--seed", *map(str, used)]))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.collect", description="Means over finished runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="folder of finished runs; several are folds")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(arguments)
    found = read_runs(given.runs)
    runs = [run for members in found.values() for run in members]
    machine = " and ".join(sorted({origin["machine"] for run in runs for origin in run["origins"]}))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_record(given.out, machine, commits_of(runs), commands(runs), tables(found))


if __name__ == "__main__":
    run_command(main)
