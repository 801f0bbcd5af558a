"""metrics.jsonl of a run: one JSON line per epoch. Readers skip lines that a full disk or a kill has damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError, naming, warn
from ..evaluation.metrics import Scores
from ..files import write_text
from ..inference.predictor import GATED
from ..validation import matches
from .health import Health

Three = tuple[float, float, float]
HINTS = {
    "epoch": int,
    "lr": float,
    "unsupervised_weight": float,
    "total": float,
    "supervised_total": float,
    "unsupervised_total": float,
    "supervised_terms": Three,
    "unsupervised_terms": Three,
    "gate_weights": tuple[Three, Three, Three],
    "loss_weights": Three,
    "speed": dict[str, float | None],
}
VALIDATED = {"val": dict[str, dict[str, float]], "health": dict[str, Three]}  # which only validated epochs have


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a record and sync it to the disk; the run writes the checkpoint of the epoch afterwards."""
    with naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records sorted by epoch, without damaged lines, which a warning counts.

    If an epoch has several records, the last one counts. Raises UserError if the file cannot be read.
    """
    return _read(path, "left out")


def _read(path: Path, fate: str) -> list[dict[str, Any]]:
    """`read`; the warning says what happens to damaged lines: "left out" or "dropped from the file"."""
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait forever
            raise UserError(f"{path}: is no file; the report needs it; restore the file")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the report needs it; restore the file") from error
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        damaged = len(lines) - len(records)
        warn(f"{path}: {damaged} damaged line{' is' if damaged == 1 else 's are'} {fate}")
    by_epoch = {record["epoch"]: record for record in records}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def truncate(path: Path, epochs: int) -> None:
    """Keep only the records of the first `epochs` epochs; drop damaged lines. A missing file stays missing."""
    if path.exists():
        text = "".join(
            json.dumps(record) + "\n" for record in _read(path, "dropped from the file") if record["epoch"] < epochs
        )
        write_text(path, text)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(matches(record.get(key), hint) for key, hint in HINTS.items())
    whole = whole and all(matches(record[key], hint) for key, hint in VALIDATED.items() if key in record)
    return record if whole and _reportable(record) else None


def _reportable(record: dict[str, Any]) -> bool:
    """Whether the scores and the health of the experts, if a record has them, are those that the report needs."""
    val, health = record.get("val"), record.get("health")
    scored = val is None or (GATED in val and all(scores.keys() >= set(Scores._fields) for scores in val.values()))
    return scored and (health is None or health.keys() >= set(Health._fields))
