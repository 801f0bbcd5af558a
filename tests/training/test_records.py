"""metrics.jsonl: reading and truncating files with damaged, missing and repeated records."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from semimoe_fast import train
from semimoe_fast.errors import UserError
from semimoe_fast.training import records, run_folder
from semimoe_fast.training.config import read_config


@pytest.fixture(scope="module")
def line(finished: Path) -> dict:
    return json.loads((finished / run_folder.METRICS_FILE).read_text().splitlines()[0])


def write(path: Path, *lines: dict | bytes) -> Path:
    path.write_bytes(b"".join(x + b"\n" if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def epochs(path: Path) -> list[int]:
    return [json.loads(text)["epoch"] for text in path.read_text().splitlines()]


def test_truncate_drops_by_epoch_not_by_line(line: dict, tmp_path: Path) -> None:
    """The record of epoch 1 is missing; epoch 3 has a record but no checkpoint."""
    path = write(tmp_path / "m", *(line | {"epoch": epoch} for epoch in (0, 2, 3)))
    records.truncate(path, 3)
    assert epochs(path) == [0, 2]


def test_last_record_of_an_epoch_counts(line: dict, tmp_path: Path) -> None:
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
        {"val": {}},
        {"val": {"gated": {"dice": 1}}},
        {"health": {"spread": [0, 0, 0]}},
    ],
    ids=lambda damage: str(damage)[:20],
)
def test_damaged_line_is_left_out_with_a_warning(line: dict, tmp_path: Path, capsys, damage: dict | bytes) -> None:
    if isinstance(damage, dict) and damage != {"epoch": 1}:
        damage = line | {"epoch": 1} | damage
    path = write(tmp_path / "m", line, damage, line | {"epoch": 2})
    assert [record["epoch"] for record in records.read(path)] == [0, 2]
    assert capsys.readouterr().err == f"warning: {path}: 1 damaged line is left out\n"


def test_missing_file_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="m: cannot be read"):
        records.read(tmp_path / "m")


def test_named_pipe_raises_user_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(UserError, match="m: is no file"):
        records.read(tmp_path / "m")


def test_run_without_valid_records_finishes_with_warnings(finished: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    write(folder / run_folder.METRICS_FILE, b"\xff", b"1")
    train.main(dataclasses.replace(read_config(folder), resume=folder))
    told = capsys.readouterr().err
    assert "2 damaged lines are dropped from the file" in told
    assert "holds no record of a validation;" in told


def test_records_are_sorted(line: dict, tmp_path: Path) -> None:
    path = write(tmp_path / "m", *(line | {"epoch": epoch} for epoch in (0, 2, 1)))
    assert [record["epoch"] for record in records.read(path)] == [0, 1, 2]


def test_checkpoint_lost_in_the_second_epoch(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in (run_folder.LAST, run_folder.OVERLAYS):
        (folder / name).unlink()
    records.truncate(folder / run_folder.METRICS_FILE, 2)
    with pytest.raises(UserError, match="is missing, but 2 epochs were trained: restore it, or start a new run"):
        train.main(dataclasses.replace(read_config(folder), resume=folder))
