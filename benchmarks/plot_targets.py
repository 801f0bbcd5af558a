"""The picture that `make results` draws: time per pixel of the distance targets over the side of the gland masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

TESTS = ("test_glands", "test_worst_masks", "test_threads")
OURS_COLORS = ("#08306b", "#2171b5", "#6baed6")
PEER_COLORS = ("C1", "C3", "C4", "C5", "C2", "C6", "C8")


@dataclass(frozen=True)
class Timing:
    test: str
    params: dict[str, Any]
    device: str
    ns: float  # per pixel
    floor: float  # of a plain copy, ns per pixel

    @property
    def row(self) -> str:
        return self.params["provider"] if "provider" in self.params else f"ours, threads: {self.params['threads']}"

    @property
    def column(self) -> str:
        return self.params["mask"] if "mask" in self.params else "{batch} x {side} x {side}".format(**self.params)


def read(benchmarks: Sequence[dict[str, Any]]) -> list[Timing]:
    """The timings of test_distance.py among the benchmarks of pytest-benchmark, in the order of the tests."""
    timings = []
    for benchmark in benchmarks:
        test, info = benchmark["name"].partition("[")[0], benchmark["extra_info"]
        if test in TESTS:
            ns = info["ns_per_pixel"]
            timings.append(Timing(test, benchmark["params"], info["device"], ns, ns * info["share_of_floor"]))
    return timings


def styles(timings: list[Timing]) -> dict[str, dict[str, Any]]:
    """Line style of each provider: ours thick and in shades of blue; dashed on a GPU."""
    devices = {t.row: t.device for t in timings}
    peers = [row for row in devices if not row.startswith("ours")]
    colors = dict(zip(peers, PEER_COLORS, strict=False))
    for device in set(devices.values()):
        ours = [row for row in devices if row not in peers and devices[row] == device]
        colors |= dict(zip(ours, OURS_COLORS, strict=False))
    return {
        row: {
            "color": colors[row],
            "linewidth": 1.4 if row in peers else 2.4,
            "linestyle": "--" if device == "cuda" else "-",
        }
        for row, device in devices.items()
    }


def draw_batch(axes: Axes, timings: list[Timing], style: dict[str, dict[str, Any]]) -> None:
    """Draw one line per provider, and a gray line for a plain copy of the bytes."""
    for row in style:
        points = sorted((t.params["side"], t.ns) for t in timings if t.row == row)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=row, **style[row])
    for device, floor in {t.device: t.floor for t in timings}.items():
        linestyle = "-." if device == "cuda" else ":"
        axes.axhline(floor, color="gray", linewidth=1, linestyle=linestyle, label=f"copy of 6 bytes, {device}")


def draw(timings: list[Timing], path: Path) -> None:
    """Draw the timings of test_glands."""
    timings = [t for t in timings if t.test == "test_glands"]
    batches = sorted({t.params["batch"] for t in timings})
    sides = sorted({t.params["side"] for t in timings})
    style = styles(timings)
    figure = Figure(figsize=(3.6 * len(batches) + 2.4, 4.8), layout="constrained")
    figure.suptitle("Distance targets of gland masks (a level line: time in proportion to the pixels)")
    panels = figure.subplots(1, len(batches), sharex=True, sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        draw_batch(axes, [t for t in timings if t.params["batch"] == batch], style)
        axes.set(xscale="log", yscale="log", title=f"batch of {batch}", xlabel="side of the masks, pixels")
        axes.xaxis.set(major_locator=FixedLocator(sides), minor_locator=NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ns a pixel")
    lines = sorted({line.get_label(): line for axes in panels for line in axes.lines}.values(), key=highest)
    figure.legend(handles=lines[::-1], loc="outside right center", frameon=False, handlelength=3.5)
    figure.savefig(path, dpi=120)


def highest(line: Line2D) -> float:
    return max(line.get_ydata())
