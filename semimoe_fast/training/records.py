"""metrics.jsonl of a run: one line of JSON an epoch, readable whatever a full disk or a kill left of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..errors import UserError, warn
from ..validation import matches

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
VAL = dict[str, dict[str, float]]  # of "val", which the records of validated epochs have


def append(path: Path, record: dict[str, Any]) -> None:
    """Write one more line; it is on the disk on return, ahead of the checkpoint that counts on it."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records in the order of their epochs. Damaged lines are left out, which a warning says.

    Of two records of one epoch the later counts. Raises UserError where the file cannot be opened.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); without it there is nothing to report") from error
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        warn(f"{path}: {len(lines) - len(records)} damaged lines are dropped; the run goes on")
    by_epoch = {record["epoch"]: record for record in records}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def truncate(path: Path, epochs: int) -> None:
    """Drop the records of epochs from `epochs` on, which will be trained again, and damaged lines."""
    if path.exists():
        text = "".join(json.dumps(record) + "\n" for record in read(path) if record["epoch"] < epochs)
        write_atomically(path, lambda part: part.write_text(text))


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(matches(record.get(key), hint) for key, hint in HINTS.items())
    return record if whole and matches(record.get("val", {}), VAL) else None
