"""An evaluation as tables of text, as rows of a CSV file and as JSON values."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, NamedTuple

from ..inference.predictor import GATED, is_boundary
from . import metrics
from .files import Evaluation, Variant
from .images import SCORES, ImageScores
from .scoring import score_set
from .summary import Estimate, Summary

LABELS = {
    "dice": "pixel Dice",
    "jaccard": "pixel Jaccard",
    "object_f1": "object F1",
    "object_dice": "object Dice",
    "object_hausdorff": "object Hausdorff",
    "hd95": "hd95",
    "assd": "assd",
}
COUNTS = "object_true_positives", "object_false_positives", "object_false_negatives"
DISTANCES = {"object_hausdorff", "hd95", "assd"}
INTERVAL = "95 % interval"
FEW = 20  # images; with fewer, intervals of 95 % cover clearly less (docs/evaluation.md has numbers)
LONGEST_NAME = 34  # characters of an image's name; then the widest table has 120


class Table(NamedTuple):
    """A table whose first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(evaluation: Evaluation) -> list[Table]:
    """The scores of each image, those of the set, and those of a model's experts."""
    return [_of_images(evaluation), _of_set(evaluation), *([_of_experts(evaluation)] if evaluation.counts else [])]


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the tables has to know, one sentence each."""
    lines = [
        f"{INTERVAL}: percentile bootstrap over the images; it needs at least two of them.",
        "pooled: all pixels, or all objects, of the set counted together.",
    ]
    if len(evaluation.pairs) < FEW:
        lines.insert(1, f"fewer than {FEW} images: the intervals are too narrow, and hold the true figure less often.")
    if evaluation.counts:
        lines.append(
            "swept: at the threshold with the best pooled Jaccard on these same images, so the scores are optimistic; "
            "their intervals hold the threshold fixed. Those of each image are in the files of --csv and --json."
        )
    if any(map(is_boundary, evaluation.counts)):
        lines.append("boundary expert: its ring against the true ring, both at the size at which the model works.")
    for variant in evaluation.variants:
        if left_out := variant.summary.images - variant.summary.means["hd95"].images:
            lines.append(
                f"distances of {_heading(variant)}: {left_out} of {variant.summary.images} images are left out of the "
                "means, because their prediction or their truth is empty."
            )
    return lines


def as_text(table: Table) -> str:
    """Columns as wide as their cells: names to the left, numbers to the right."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = ["  ".join([f"{name:<{widths[0]}}", *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]
    return "\n".join([table.title, rule, text[0], rule, *text[1:], rule])


def rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each image and predictor; None where a score is undefined, or is not computed for an expert."""
    found = []
    half = metrics.THRESHOLDS[metrics.HALF]
    for i, name in enumerate(evaluation.names):
        for variant in evaluation.variants:
            scores = {score: _defined(getattr(variant.scores, score)[i].item()) for score in SCORES}
            scores |= zip(COUNTS, variant.scores.object_counts[i].tolist(), strict=True)
            found.append(_row(name, variant.predictor, variant.threshold, variant.swept, scores))
        for predictor, counts in evaluation.counts.items():
            if predictor != GATED:
                dice, jaccard = metrics.dice_and_jaccard(counts[i, metrics.HALF])
                scores = {"dice": dice.item(), "jaccard": jaccard.item()}
                found.append(_row(name, predictor, half, False, scores))
    return found


def _row(image: str, predictor: str, threshold: float | None, swept: bool, scores: dict[str, Any]) -> dict[str, Any]:
    first = {"image": image, "predictor": predictor, "threshold": threshold, "swept": swept}
    return first | dict.fromkeys([*SCORES, *COUNTS]) | scores


def as_csv(evaluation: Evaluation) -> str:
    """The rows with a header; cells of undefined scores are empty."""
    file = io.StringIO()
    found = rows(evaluation)
    writer = csv.DictWriter(file, found[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"swept": int(row["swept"])} for row in found)
    return file.getvalue()


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """JSON values: "variants", the figures of the set; "predictors", pooled pixel scores; "images", the rows."""
    variants = [
        {"predictor": v.predictor, "threshold": v.threshold, "swept": v.swept, **_summary(v.summary)}
        for v in evaluation.variants
    ]
    pooled = {name: scores._asdict() for name, scores in score_set(evaluation.counts).items()}
    return {"variants": variants, "predictors": pooled, "images": rows(evaluation)}


def _summary(summary: Summary) -> dict[str, Any]:
    def values(estimates: dict[str, Estimate]) -> dict[str, Any]:
        return {name: {k: _defined(v) for k, v in e._asdict().items()} for name, e in estimates.items()}

    return {"image_count": summary.images, "means": values(summary.means), "pooled": values(summary.pooled)}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _of_images(evaluation: Evaluation) -> Table:
    first = evaluation.variants[0]
    columns = [[_number(name, value) for value in getattr(first.scores, name).tolist()] for name in SCORES]
    names = map(_short, evaluation.names)
    title = f"each image, {_heading(first)} (distances in pixels)"
    return Table(title, ["image", *LABELS.values()], [list(row) for row in zip(names, *columns, strict=True)])


def _of_set(evaluation: Evaluation) -> Table:
    summaries = [variant.summary for variant in evaluation.variants]
    found = [(f"mean {label}", name, [s.means[name] for s in summaries]) for name, label in LABELS.items()]
    found += [(f"pooled {LABELS[name]}", name, [s.pooled[name] for s in summaries]) for name in summaries[0].pooled]
    header = [cell for variant in evaluation.variants for cell in (_heading(variant), INTERVAL)]
    lines = [
        [label, *(cell for estimate in estimates for cell in _estimate(name, estimate))]
        for label, name, estimates in found
    ]
    numbers = [_object_numbers(variant.scores) for variant in evaluation.variants]
    for label, counted in zip(("predicted objects", "true objects"), zip(*numbers, strict=True), strict=True):
        lines.append([label, *(cell for number in counted for cell in (str(number), "-"))])
    return Table(f"all {summaries[0].images} images (distances in pixels)", ["score", *header], lines)


def _object_numbers(scores: ImageScores) -> tuple[int, int]:
    """The numbers of predicted and of true objects of the set."""
    found, false, missed = scores.object_counts.sum(0).tolist()
    return found + false, found + missed


def _of_experts(evaluation: Evaluation) -> Table:
    lines = []
    for predictor, s in score_set(evaluation.counts).items():
        numbers = (s.dice, s.jaccard, s.swept_dice, s.swept_jaccard)
        lines.append([predictor, *(f"{x:.4f}" for x in numbers), f"{s.swept_threshold:.2f}"])
    header = ["predictor", "Dice at 0.50", "Jaccard at 0.50", "swept Dice", "swept Jaccard", "threshold"]
    return Table("pooled pixel scores of the gated mask and of each expert alone", header, lines)


def _heading(variant: Variant) -> str:
    if variant.threshold is None:
        return variant.predictor
    return f"{'swept' if variant.swept else variant.predictor} at {variant.threshold:.2f}"


def _estimate(name: str, estimate: Estimate) -> list[str]:
    low, high = _number(name, estimate.low), _number(name, estimate.high)
    return [_number(name, estimate.value), "-" if math.isnan(estimate.low) else f"{low} to {high}"]


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if name in DISTANCES else f"{value:.4f}"


def _short(name: str) -> str:
    """The end of a long name, which tells tiles of one image apart."""
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"
