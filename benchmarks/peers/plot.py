"""Learning curves of finished runs: `python -m benchmarks.peers.plot RUNS --out docs/accuracy.png`.

Mean over seeds: Dice of val and of the unlabeled images, if all runs had masks of them, and what Semi-MoE learns
besides: the weights of its losses, and the weight of each expert in the gated mask.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import counted
from semimoe_fast.errors import run_command

from .collect import BASE, Run, grouped, name_of, read_runs
from .semi_moe import TASKS

Point = dict[str, Any]


def draw(runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(14, 9), layout="constrained")
    val, unlabeled, losses, gates = figure.subplots(2, 2).flat
    groups = grouped(runs)
    colors = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    for number, members in enumerate(groups):
        curves = [run["curve"] for run in members]
        color, lr = colors(number % colors.N), members[0]["arguments"]["lr"]
        name = f"{name_of(members[0])}, --lr {lr:g}, {counted(len(members), 'run')}"
        plot(val, curves, lambda point: point["dice"], color=color, label=name)
        if all("unlabeled_dice" in point for points in curves for point in points):
            plot(unlabeled, curves, lambda point: point["unlabeled_dice"], color=color, label=name)
        if members[0]["method"] != BASE:
            continue
        for index, (task, style) in enumerate(zip(TASKS, ("-", "--", ":"), strict=True)):
            label = f"{name}: {task}"
            plot(losses, curves, lambda p, i=index: p["loss_weights"][i], color=color, linestyle=style, label=label)
            plot(gates, curves, lambda p, i=index: p["gate_weights"][0][i], color=color, linestyle=style, label=label)
    titles = {
        val: "val, Dice at threshold 0.5",
        unlabeled: "unlabeled training images, Dice at threshold 0.5",
        losses: "learned loss weights exp(-s)",
        gates: "weights of the experts in the gated mask",
    }
    for axis, title in titles.items():
        axis.set_title(title)
        axis.set_xlabel("epochs")
        axis.grid(alpha=0.3)
    for axis in (val, losses):  # for the axes to their right, too
        if axis.lines:
            axis.legend(fontsize=7)
    return figure


def plot(axis: Axes, curves: Sequence[Sequence[Point]], value: Callable[[Point], float], **style: Any) -> None:
    """Draw the mean over curves, whose points are of the same epochs."""
    means = [statistics.mean(map(value, points)) for points in zip(*curves, strict=True)]
    axis.plot([point["epoch"] for point in curves[0]], means, **style)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.plot", description="Learning curves of runs.")
    parser.add_argument("runs", type=Path, help="folder of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(read_runs([given.runs])[given.runs]).savefig(given.out, dpi=80)


if __name__ == "__main__":
    run_command(main)
