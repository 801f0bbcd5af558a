"""Training from the command line: what a run leaves behind, resuming bitwise, interruption."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from semimoe_fast import checkpoint, train
from semimoe_fast.data.folders import read_image
from semimoe_fast.training import config, interruption, run, run_folder

TRAIN = [sys.executable, "-m", "semimoe_fast.train"]


def contents(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return checkpoint.read(path)


def assert_same_run(folder: Path, other: Path) -> None:
    """Model, optimizers, s, position, random state and records, bit for bit (but for the speed)."""
    for name in (run_folder.LAST, run_folder.BEST):
        (metadata, tensors), (expected_metadata, expected) = contents(folder / name), contents(other / name)
        assert metadata == expected_metadata
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    ours, theirs = (
        [{k: v for k, v in json.loads(line).items() if k != "speed"} for line in text.splitlines()]
        for text in ((f / run_folder.METRICS_FILE).read_text() for f in (folder, other))
    )
    assert ours == theirs


def test_run_folder(finished: Path) -> None:
    expected = {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "curves.png",
        "overlays.png",
    }
    if importlib.util.find_spec("tensorboard") is not None:
        expected.add("tensorboard")
        assert (next((finished / "tensorboard").iterdir())).stat().st_size > 1000
    assert {path.name for path in finished.iterdir()} == expected
    for picture in ("curves.png", "overlays.png"):
        pixels = read_image(finished / picture)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 10
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert [record["lr"] for record in records] == [0, 0.1, 0.1]
    for record in records:
        assert set(record["val"]) == {"gated", "mask expert", "sdf expert", "boundary expert"}
        assert [sum(task) for task in record["gate_weights"]] == pytest.approx([1, 1, 1])
        assert record["total"] == pytest.approx(record["supervised_total"] + record["unsupervised_total"])
    stored = config.read_config(finished)
    assert (stored.width, stored.image_size, stored.seed, stored.synthetic) == (2, 32, 3, (2, 4, 2))


def test_training_reduces_the_loss(finished: Path) -> None:
    totals = [json.loads(line)["supervised_total"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert totals[-1] < totals[0]


def test_same_seed_same_run_other_seed_other_run(tiny: list[str], finished: Path, tmp_path: Path) -> None:
    train.main([*tiny, "--out", str(tmp_path / "same")])
    assert_same_run(tmp_path / "same", finished)
    train.main([*tiny, "--seed", "4", "--out", str(tmp_path / "other")])
    tensors, expected = (contents(folder / run_folder.LAST)[1] for folder in (tmp_path / "other", finished))
    assert not torch.equal(tensors["model.gating.heads.0.weight"], expected["model.gating.heads.0.weight"])


def test_command_is_the_same_run(tiny: list[str], finished: Path, tmp_path: Path) -> None:
    """As a process of its own, without the deterministic mode that the tests run in."""
    subprocess.run([*TRAIN, *tiny, "--out", str(tmp_path / "run")], check=True, capture_output=True)
    assert_same_run(tmp_path / "run", finished)


def test_profiled_run_is_the_same_run(tiny: list[str], finished: Path, tmp_path: Path, capsys) -> None:
    """Three of its steps are recorded, with the end of an epoch between them."""
    train.main([*tiny, "--profile", "--out", str(tmp_path / "run")])
    assert "mean of 3 steps (the run had no more)" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)
    assert (tmp_path / "run" / config.CONFIG_FILE).read_text() == (finished / config.CONFIG_FILE).read_text()


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_bf16_follows_fp32(tiny_config: config.TrainConfig, tmp_path: Path, device: str) -> None:
    """Without dropout, which a GPU draws otherwise for every dtype."""

    def first_epoch(precision: str) -> dict:
        folder = tmp_path / precision
        train.main(
            dataclasses.replace(tiny_config, epochs=1, dropout=0.0, device=device, precision=precision, out=folder)
        )
        return json.loads((folder / run_folder.METRICS_FILE).read_text())

    ours, theirs = first_epoch("bf16"), first_epoch("fp32")
    # the first epoch has a learning rate of 0: the same weights, evaluated with 8 bits of mantissa through 23 layers
    assert ours["supervised_total"] == pytest.approx(theirs["supervised_total"], rel=0.02)
    assert ours["supervised_total"] != theirs["supervised_total"]


class StopAfter(interruption.Interruption):
    """An interruption that comes after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        self.received = signal.SIGINT if self.left <= 0 else 0
        return self.left <= 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_interrupted_run_resumes_bitwise(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Two steps an epoch, so that some interruptions fall inside an epoch and some between two."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda _: StopAfter(steps))
        with pytest.raises(SystemExit) as exit_:
            train.main([*tiny, "--out", str(folder)])
    assert exit_.value.code == 128 + signal.SIGINT
    train.main(["--resume", str(folder), "--profile"])  # which, like the place, is no part of the configuration
    assert_same_run(folder, finished)


def test_options_resume_bitwise(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the average of the weights, parts of a batch and images that come from the host."""
    options = [*tiny, *"--ema 0.9 --accumulate 2 --joint-forward --data_device host".split()]
    train.main([*options, "--out", str(tmp_path / "undisturbed")])
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda _: StopAfter(3))
        with pytest.raises(SystemExit):
            train.main([*options, "--out", str(tmp_path / "run")])
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("victim", ["save last", "save best", "metrics", "validation", "step"])
def test_killed_run_resumes_bitwise(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Death in the second epoch, at each of the points that leave something half done on the disk."""
    folder = tmp_path / "run"

    class Killed(BaseException):
        """No handler of errors catches it."""

    def dying(function, when):
        def call(*arguments, **keywords):
            if when(*arguments):
                raise Killed
            return function(*arguments, **keywords)

        return call

    def in_second_epoch(*_) -> bool:
        return (folder / run_folder.LAST).exists()

    def saving_in_second_epoch(path: Path, *_) -> bool:
        return path.name == (run_folder.LAST if victim == "save last" else run_folder.BEST) and in_second_epoch()

    with monkeypatch.context() as patch:
        if victim.startswith("save"):
            patch.setattr(checkpoint, "save", dying(checkpoint.save, saving_in_second_epoch))
        elif victim == "validation":
            patch.setattr(run, "count_set", dying(run.count_set, in_second_epoch))
        elif victim == "metrics":
            patch.setattr(run.records, "append", dying(run.records.append, in_second_epoch))
        else:
            patch.setattr(run.Trainer, "train_step", dying(run.Trainer.train_step, in_second_epoch))
        with pytest.raises(Killed):
            train.main([*tiny, "--out", str(folder)])
    if victim == "metrics":
        with (folder / run_folder.METRICS_FILE).open("a") as file:
            file.write('{"epoch": 1, "half a li')
    train.main(["--resume", str(folder)])
    assert_same_run(folder, finished)


def test_damaged_record_is_dropped_and_the_run_ends_well(finished: Path, tmp_path: Path, capsys) -> None:
    """A line that a full disk cut short, of an epoch before the checkpoint, and two that are no records at all."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / run_folder.METRICS_FILE).read_text().splitlines()
    damaged = [lines[0].encode(), lines[1][:100].encode(), b"\xff\xfe", b"1", lines[2].encode()]
    (folder / run_folder.METRICS_FILE).write_bytes(b"\n".join(damaged))
    train.main(["--resume", str(folder)])
    assert "3 damaged lines are dropped" in capsys.readouterr().err
    assert (folder / run_folder.METRICS_FILE).read_text() == f"{lines[0]}\n{lines[2]}\n"


def test_run_without_checkpoint_starts_over(tiny: list[str], finished: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*tiny, "--out", str(folder)])
    train.main(["--resume", str(folder)])
    assert_same_run(folder, finished)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(tiny: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """A real process: SIGINT and SIGTERM save and say how to go on; after SIGKILL the last checkpoint is whole."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*TRAIN, *tiny, "--epochs", "10000", "--out", str(folder)], stdout=subprocess.PIPE, text=True
    )
    wait_for((folder / run_folder.LAST).exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"continue with: python -m semimoe_fast.train --resume {folder}" in output
    metadata, _ = contents(folder / run_folder.LAST)
    assert metadata["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.2])
def test_sigkill_and_resume_as_processes(tiny: list[str], tmp_path: Path, delay: float) -> None:
    """Killed by the system at no chosen moment, resumed by the command: as the run that was left alone."""
    options = [*tiny, "--epochs", "12"]
    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    process = subprocess.Popen([*TRAIN, *options, "--out", str(folder)], stdout=subprocess.DEVNULL)
    wait_for((folder / run_folder.LAST).exists)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed: give it more epochs"
    subprocess.run([*TRAIN, "--resume", str(folder)], check=True, stdout=subprocess.DEVNULL)
    train.main([*options, "--out", str(undisturbed)])
    assert_same_run(folder, undisturbed)


def test_resume_of_a_finished_run_only_reports(finished: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("tyro")
    before = (finished / run_folder.LAST).read_bytes()
    train.main(["--resume", str(finished)])
    assert (finished / run_folder.LAST).read_bytes() == before
    assert "last, gated" in capsys.readouterr().out


def test_supervised_baseline_takes_as_many_steps_as_asked(tiny: list[str], tmp_path: Path) -> None:
    train.main([*tiny, "--unlabeled", "none", "--steps-per-epoch", "2", "--epochs", "1", "--out", str(tmp_path / "r")])
    record = json.loads((tmp_path / "r" / run_folder.METRICS_FILE).read_text())
    assert record["unsupervised_total"] == 0
    assert record["unsupervised_terms"] == [0, 0, 0]
