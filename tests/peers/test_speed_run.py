"""The speed run: a record adds a row and a log, anything else changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semimoe_fast.errors import UserError

speed_run = pytest.importorskip("benchmarks.speed_run", reason="needs the source tree, and tests run from its root")


@pytest.fixture
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed_run, "RULES", "--unlabeled none --image-size 32 --device cpu --threads 1")
    monkeypatch.setattr(speed_run, "RECIPE", "--width 2 --lr 0.1 --epochs 2 --warmup-epochs 0 --val-every 2")
    monkeypatch.setattr(speed_run, "SEEDS", (0, 5))
    return folder


def test_records_are_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_run, "TARGET", 0.0)
    speed_run.main(["--data", str(data), "--change", "the first", "--out", str(tmp_path)])
    monkeypatch.setattr(speed_run, "SEEDS", (5,))
    speed_run.main(["--data", str(data), "--change", "the second", "--out", str(tmp_path)])
    history = json.loads((tmp_path / "speed_run.json").read_text())["tables"]["history"]
    first, second = (dict(zip(history["columns"], row, strict=True)) for row in history["rows"])
    assert (first["record"], first["change"], second["record"], second["change"]) == (1, "the first", 2, "the second")
    assert first["seconds"] > 0

    origin, *lines = (json.loads(line) for line in (tmp_path / "speed_run_1.jsonl").read_text().splitlines())
    assert speed_run.commit_of(origin) == first["commit"]
    assert speed_run.RECIPE in origin["command"]
    assert [line["config"]["seed"] for line in lines if "config" in line] == [0, 5]
    assert [(line["seed"], line["epoch"]) for line in lines if "epoch" in line] == [(0, 0), (0, 1), (5, 0), (5, 1)]
    scores = [line["dice"] for line in lines if "dice" in line]
    assert scores == [line["val"]["gated"]["dice"] for line in lines if "val" in line]
    assert first["Dice"] == pytest.approx(sum(scores) / 2, abs=1e-4)
    assert first["lowest Dice"] == pytest.approx(min(scores), abs=1e-4)
    assert second["Dice"] == pytest.approx(scores[1], abs=1e-4)


def test_runs_below_the_target_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = [{"val": {"gated": {"dice": dice}}} for dice in (0.9, 0.879)]  # the last one counts
    monkeypatch.setattr(speed_run, "train", lambda data, seed: speed_run.Timed(1.0, {}, epochs))
    with pytest.raises(UserError, match=r"no record: the mean Dice is 0\.879, below 0\.88"):
        speed_run.main(["--data", "GlaS85", "--change", "none", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_failed_trainings_leave_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed 0 failed with status 2"):
        speed_run.main(["--data", str(data / "missing"), "--change", "none", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
