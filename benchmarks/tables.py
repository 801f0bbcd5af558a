"""Write the tables of README.md, docs/ and benchmarks/results/ from the measurements in benchmarks/results/*.json.

    make tables                                # or python benchmarks/tables.py
    python benchmarks/tables.py --check        # only name the pages whose tables are stale

A page marks a table with `<!-- table NAME -->` and `<!-- end -->`; all between the two is replaced. NAME is FILE/TABLE,
a whole table of results/FILE.json, or the name of a summary below. results/README.md describes the JSON files.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Record = dict[str, Any]  # the content of a file of results


def read(name: str) -> Record:
    return json.loads((RESULTS / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------------ whole tables


def whole(name: str, table: str) -> str:
    """A table of a file with all its rows, the mean of the rows and the ratios of columns that it asks for."""
    record = read(name)
    content = record["tables"][table]
    columns, rows = content["columns"], [list(row) for row in content["rows"]]
    if content.get("mean"):
        rows.append(["mean", *(statistics.mean(column) for column in list(zip(*rows, strict=True))[1:])])
    base = next((row for row in rows if row[0] == content.get("relative_to")), None)
    cells = [[text(value, content.get("format", "g")) for value in row] for row in rows]
    if base is not None:
        for line, row in zip(cells, rows, strict=True):
            line[1:] = [beside(c, v, b) for c, v, b in zip(line[1:], row[1:], base[1:], strict=True)]
    for above, below in content.get("ratios", {}).values():
        for line, row in zip(cells, rows, strict=True):
            line.append(two_digits(row[columns.index(above)] / row[columns.index(below)]))
    return markdown([*columns, *content.get("ratios", {})], cells) + source(record, content.get("title", ""))


def text(value: Any, spec: str) -> str:
    """A cell; nothing where nothing was measured."""
    return "" if value is None else format(value, spec) if isinstance(value, float) else str(value)


def beside(cell: str, value: float | None, base: float) -> str:
    return cell if value is None else f"{cell} ({two_digits(value / base)})"


def two_digits(ratio: float) -> str:
    return f"{float(f'{ratio:.2g}'):g}"


# --------------------------------------------------------------------------------------------------------- summaries


def accuracy() -> str:
    """Dice and Jaccard at threshold 0.5: the mean over the seeds of the synthetic glands, and of GlaS."""
    synthetic, glas = read("synthetic"), read("accuracy/glas")
    seeds = synthetic["tables"]["scores"]["rows"]
    means = [statistics.mean(column) for column in list(zip(*seeds, strict=True))[1:]]
    methods = {row[0]: row for row in glas["tables"]["scores"]["rows"]}
    runs = [methods[name] for name in ("semi-moe", "supervised")]  # Dice and Jaccard as mean and spread
    of_glas = [float(score.partition(" ")[0]) for row in runs for score in row[3:5]]
    rows = [
        [f"synthetic glands, 8 + 64 images, mean of {len(seeds)} seeds", *means[:2], *means[3:5]],
        [f"GlaS, 17 + 68 images, width 16, 128 x 128, mean of {runs[0][2]} seeds", *of_glas],
    ]
    columns = ["labeled + unlabeled", "Semi-MoE: Dice", "Jaccard", "supervised: Dice", "Jaccard"]
    cells = [[label, *(f"{score:.3f}" for score in scores)] for label, *scores in rows]
    return markdown(columns, cells) + source(synthetic, "Synthetic glands") + source(glas, "GlaS").lstrip()


def targets() -> str:
    """Nanoseconds a pixel of two sizes."""
    record = read("targets")
    content = record["tables"]["glands"]
    sizes = ["8 x 256 x 256", "1 x 1024 x 1024"]
    names = {
        content["relative_to"]: "ours",
        "numba": "Numba",
        "opencv": "OpenCV",
        "edt": "edt",
        "scipy + scikit-image": "SciPy + scikit-image",
    }
    rows = {row[0]: row for row in content["rows"]}
    cells = [[size, *(text(rows[key][content["columns"].index(size)], "g") for key in names)] for size in sizes]
    return markdown(["ns a pixel, gland masks", *names.values()], cells) + source(record)


def operations() -> str:
    """Milliseconds of multi-gating and objective."""
    record = read("operations")
    gating, objective = (
        {row[0]: row[1:4] for row in record["tables"][table]["rows"]} for table in ("gating", "objective")
    )
    rows = [
        ["multi-gating with own heads, 3 x (2, 64, 256, 256)", *gating["NCHW"]],
        ["objective terms of two sets of predictions, (2, 256, 256)", *objective["two sets of predictions, B = 2"]],
    ]
    cells = [[label, *(text(value, "g") for value in values)] for label, *values in rows]
    return markdown(["ms, forward and backward", "ours", "reference", "reference compiled"], cells) + source(record)


def step() -> str:
    """Seconds of a training step."""
    record = read("step")
    cells = [
        [case.removesuffix(", cpu"), *(f"{ms / 1000:.2g}" for ms in (ours, baseline, bare))]
        for case, baseline, ours, bare, *_ in record["tables"]["step"]["rows"]
    ]
    return markdown(["seconds a step", "ours", "published trainer, rewritten", "U-Nets alone"], cells) + source(record)


def separation() -> str:
    """Object scores of three ways to separate glands, on validation images."""
    record = read("separation")
    content = record["tables"]["val"]
    names = {
        "components, at least 100 pixels": "8-connected components",
        "sdf, level 0.3, 100": "watershed on the sdf (`--instances`)",
        "distance to the background, level 0.3, 100": "watershed on the distance to the background",
    }
    rows = {row[0]: row for row in content["rows"]}
    cells = [[title, *(text(value, ".3f") for value in rows[name][1:])] for name, title in names.items()]
    return markdown(content["columns"], cells) + source(record)


def native() -> str:
    """Dice by way of prediction and by training: the mean over the seeds, and the range of several."""
    record = read("native")
    rows = record["tables"]["scores"]["rows"]
    trainings = sorted({tuple(row[:2]) for row in rows})
    ways = dict.fromkeys(row[3] for row in rows)

    def cell(training: tuple, way: str, column: int) -> str:
        dice = [row[column] for row in rows if tuple(row[:2]) == training and row[3] == way]
        spread = f" ({min(dice):.3f} to {max(dice):.3f})" if len(dice) > 1 else ""
        return f"{statistics.mean(dice):.3f}{spread}"

    cells = [
        [way + suffix, *(cell(training, way, column) for training in trainings)]
        for way in ways
        for column, suffix in ((4, ""), (5, ", --tta"))
    ]
    columns = ["prediction", *(f"{size} x {size}{', --antialias' * antialias}" for size, antialias in trainings)]
    return markdown(columns, cells) + source(record)


SUMMARIES: dict[str, Callable[[], str]] = {
    f.__name__: f for f in (accuracy, targets, operations, step, separation, native)
}


# ------------------------------------------------------------------------------------------------------------- pages


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(record: Record, title: str = "") -> str:
    """Where the figures come from, as a line below the table."""
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    start = f"{title}: measured on" if title else "Measured on"
    return f"\n{start} {record['machine']}; {versions}; commit {record['commit']}, {record['date']}.\n"


def table(name: str) -> str:
    file, _, part = name.rpartition("/")
    return whole(file, part) if file else SUMMARIES[part]()


def render(page: str) -> str:
    """A page with its tables as they are measured."""
    return MARKED.sub(lambda match: f"{match[1]}{table(match['name'])}{match[3]}", page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]


def stale() -> list[Path]:
    """The pages whose tables differ from the measurements."""
    return [path for path in pages() if render(path.read_text()) != path.read_text()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; name stale pages, and fail if there are")
    check = parser.parse_args().check
    found = stale()
    for path in found:
        print(f"{path.relative_to(ROOT)}: {'stale, run make tables' if check else 'written'}")
        if not check:
            path.write_text(render(path.read_text()))
    raise SystemExit(check and bool(found))


if __name__ == "__main__":
    main()
