"""The speed run: a record adds a row and a log, anything else changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semimoe_fast.errors import UserError
from semimoe_fast.training.command_line import parse

speed_run = pytest.importorskip("benchmarks.speed_run", reason="needs the source tree, and tests run from its root")


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_run, "commit", lambda: "0123456" + "0" * 33)


def run(out: Path, change: str = "none", data: Path = Path("GlaS256")) -> list[dict[str, Any]]:
    """Run the command -> its history."""
    speed_run.main(["--data", str(data), "--change", change, "--out", str(out)])
    return speed_run.read_history(out / speed_run.HISTORY)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: float, *scores: float) -> None:
    """Trainings that take so long and have these scores after the last epoch, in the order of the seeds."""
    runs = [speed_run.Timed(seconds, {}, [{"val": {"gated": {"dice": dice}}} for dice in (0.99, s)]) for s in scores]
    monkeypatch.setattr(speed_run, "train", lambda data, seed: runs[seed])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_rules_overrule_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    monkeypatch.setattr(speed_run, "RECIPE", f"{speed_run.RECIPE} --image-size 64 --threads 1 --val easy")
    config = parse(["--data", "GlaS256", *speed_run.options(2).split()])
    assert (config.labeled, config.unlabeled, config.val) == ("train_all_85", "none", "val")
    assert (config.image_size, config.device, config.threads, config.seed) == (128, "cpu", 2, 2)
    assert config.val_every == config.epochs  # scored once


def test_a_record_is_logged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    recipe = "--width 2 --lr 0.1 --epochs 2 --warmup-epochs 0 --val-every 2"
    monkeypatch.setattr(speed_run, "RECIPE", recipe)
    monkeypatch.setattr(speed_run, "RULES", "--unlabeled none --image-size 32 --device cpu --threads 1")
    monkeypatch.setattr(speed_run, "SEEDS", (0, 5))
    monkeypatch.setattr(speed_run, "TARGET", 0.0)
    (row,) = run(tmp_path / "new", "the first", folder)
    origin, *lines = (json.loads(line) for line in (tmp_path / "new" / "speed_run_1.jsonl").read_text().splitlines())
    assert origin["commit"].startswith(row["commit"])
    assert recipe in origin["command"]
    assert [line["config"]["seed"] for line in lines if "config" in line] == [0, 5]
    assert [(line["seed"], line["epoch"]) for line in lines if "epoch" in line] == [(0, 0), (0, 1), (5, 0), (5, 1)]
    times, scores = zip(*((line["seconds"], line["dice"]) for line in lines if "dice" in line), strict=True)
    assert list(scores) == [line["val"]["gated"]["dice"] for line in lines if "val" in line]
    assert row["Dice"] == pytest.approx(sum(scores) / 2, abs=1e-4)
    assert row["lowest Dice"] == pytest.approx(min(scores), abs=1e-4)
    assert row["seconds"] == pytest.approx(sum(times) / 2, abs=0.1)
    assert (row["record"], row["change"]) == (1, "the first")


def test_only_faster_runs_that_reach_the_target_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 50.0, 0.87, 0.88, 0.89)
    run(tmp_path)
    before = contents(tmp_path)
    pretend(monkeypatch, 49.0, 0.87, 0.88, 0.8899)
    with pytest.raises(UserError, match=r"no record: the mean Dice is 0\.879967, below 0\.88"):
        run(tmp_path)
    pretend(monkeypatch, 50.0, 0.9, 0.9, 0.9)
    with pytest.raises(UserError, match=r"no record: 50\.0 s, and this machine has one of 50\.0 s"):
        run(tmp_path)
    assert contents(tmp_path) == before
    pretend(monkeypatch, 49.0, 0.9, 0.9, 0.9)
    assert [row["seconds"] for row in run(tmp_path)] == [50.0, 49.0]
    assert contents(tmp_path).keys() == {"speed_run.json", "speed_run_1.jsonl", "speed_run_2.jsonl"}


@pytest.mark.parametrize("text", ["{", "{}", '{"tables": {"history": {"rows": [[1]]}}}'])
def test_damaged_histories_are_refused_before_training(text: str, tmp_path: Path) -> None:
    (tmp_path / speed_run.HISTORY).write_text(text)
    with pytest.raises(UserError, match=r"speed_run\.json is no history of speed runs"):
        run(tmp_path)
    assert contents(tmp_path) == {speed_run.HISTORY: text.encode()}


def test_what_cannot_be_repeated_or_shown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"give one line without \|"):
        run(tmp_path, "a | b")
    for commit in (None, "0123456" + "0" * 33 + "-dirty"):
        monkeypatch.setattr(speed_run, "commit", lambda commit=commit: commit)
        with pytest.raises(UserError, match=r"the code is that of commit .*: commit it first"):
            run(tmp_path)


def test_failed_trainings_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the training with seed 0 ended with status 2"):
        run(tmp_path / "out", data=tmp_path / "missing")
    assert not list((tmp_path / "out").iterdir())
