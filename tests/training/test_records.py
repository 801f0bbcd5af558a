"""metrics.jsonl: what is read back of it, whatever it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from semimoe_fast import train
from semimoe_fast.errors import UserError
from semimoe_fast.training import records, run_folder


@pytest.fixture(scope="module")
def line(finished: Path) -> dict:
    return json.loads((finished / run_folder.METRICS_FILE).read_text().splitlines()[0])


def write(path: Path, *lines: dict | bytes) -> Path:
    path.write_bytes(b"".join(x + b"\n" if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def epochs(path: Path) -> list[int]:
    return [json.loads(text)["epoch"] for text in path.read_text().splitlines()]


def test_epochs_to_be_trained_again_are_dropped_even_after_a_lost_line(line: dict, tmp_path: Path) -> None:
    """Epoch 1 was damaged and is gone; 3 was recorded, and the process killed ahead of its checkpoint."""
    path = write(tmp_path / "m", *(line | {"epoch": epoch} for epoch in (0, 2, 3)))
    records.truncate(path, 3)
    assert epochs(path) == [0, 2]


def test_later_record_of_an_epoch_counts(line: dict, tmp_path: Path) -> None:
    path = write(tmp_path / "m", *(line | {"epoch": epoch, "lr": lr} for epoch, lr in ((0, 1), (1, 1), (1, 2))))
    assert [(record["epoch"], record["lr"]) for record in records.read(path)] == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"epoch": 1, "half',
        b"\xff\xfe",
        b"1",
        b"null",
        b"[" * 100_000,
        b"",
        {"epoch": 1},
        {"total": "0.5"},
        {"total": float("nan")},
        {"supervised_terms": [1, 2]},
        {"val": {"gated": 1}},
    ],
    ids=lambda damage: str(damage)[:20],
)
def test_damaged_line_is_told_and_left_out(line: dict, tmp_path: Path, capsys, damage: dict | bytes) -> None:
    if isinstance(damage, dict) and damage != {"epoch": 1}:
        damage = line | {"epoch": 1} | damage
    path = write(tmp_path / "m", line, damage, line | {"epoch": 2})
    assert [record["epoch"] for record in records.read(path)] == [0, 2]
    assert capsys.readouterr().err == f"warning: {path}: 1 damaged lines are dropped; the run goes on\n"


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="m: cannot be read"):
        records.read(tmp_path / "m")


def test_run_without_a_whole_record_still_ends_well(finished: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    write(folder / run_folder.METRICS_FILE, b"\xff", b"1")
    train.main(["--resume", str(folder)])
    told = capsys.readouterr().err
    assert "2 damaged lines are dropped" in told
    assert "holds no record of a validation any more" in told
