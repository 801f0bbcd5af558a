"""Runs: files of the run folder, reproducibility, interruption, bitwise resuming."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from stopping import StopAfter

from semimoe_fast import checkpoint, train
from semimoe_fast.data.folders import read_image
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.training import config, records, report, run, run_folder
from semimoe_fast.training.distributed import World
from semimoe_fast.training.interruption import Interruption

TRAIN = [sys.executable, "-m", "semimoe_fast.train"]


def start(tiny_config: config.TrainConfig, folder: Path, **changes) -> None:
    train.main(dataclasses.replace(tiny_config, out=folder, **changes))


def resume(folder: Path, **changes) -> None:
    train.main(dataclasses.replace(config.read_config(folder), resume=folder, **changes))


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


def test_seed_determines_the_run(tiny_config: config.TrainConfig, finished: Path, tmp_path: Path) -> None:
    start(tiny_config, tmp_path / "same")
    runs.require_same(tmp_path / "same", finished)
    start(tiny_config, tmp_path / "other", seed=4)
    tensors, expected = (checkpoint.read(folder / run_folder.LAST)[1] for folder in (tmp_path / "other", finished))
    assert not torch.equal(tensors["model.gating.heads.0.weight"], expected["model.gating.heads.0.weight"])


def test_curves_count_epochs_from_1(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    kept = records.read(finished / run_folder.METRICS_FILE)
    report.draw_curves(kept, ("mask", "sdf", "boundary"), tmp_path / "curves.png")
    ends = {line.get_xdata()[-1] for axis in figures[0].axes for line in axis.lines}
    assert ends == {len(kept)}


def test_command_line_gives_the_same_run(tiny: list[str], finished: Path, tmp_path: Path) -> None:
    """A separate process, without the deterministic mode of the tests."""
    subprocess.run([*TRAIN, *tiny, "--out", str(tmp_path / "run")], check=True, capture_output=True)
    runs.require_same(tmp_path / "run", finished)


@pytest.mark.slow
def test_profiled_run_is_the_same_run(tiny_config: config.TrainConfig, finished: Path, tmp_path: Path, capsys) -> None:
    """The profile records three steps, with the end of an epoch between them."""
    start(tiny_config, tmp_path / "run", profile=True)
    assert "mean of 3 steps (the run had no more)" in capsys.readouterr().out
    runs.require_same(tmp_path / "run", finished)
    assert (tmp_path / "run" / config.CONFIG_FILE).read_text() == (finished / config.CONFIG_FILE).read_text()


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_bf16_follows_fp32(tiny_config: config.TrainConfig, tmp_path: Path, device: str) -> None:
    """Without dropout, because a GPU draws other numbers for each dtype."""

    def first_epoch(precision: str) -> dict:
        folder = tmp_path / precision
        start(tiny_config, folder, epochs=1, dropout=0.0, device=device, precision=precision)
        return json.loads((folder / run_folder.METRICS_FILE).read_text())

    ours, theirs = first_epoch("bf16"), first_epoch("fp32")
    # the learning rate of the first epoch is 0, so the weights are equal; bf16 has 8 bits of mantissa, over 23 layers
    assert ours["supervised_total"] == pytest.approx(theirs["supervised_total"], rel=0.02)
    assert ours["supervised_total"] != theirs["supervised_total"]


@pytest.mark.parametrize("steps", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_run_resumes_bitwise(
    tiny_config: config.TrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """With two steps per epoch: interruptions within an epoch and at its end."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda _: StopAfter(steps))
        with pytest.raises(SystemExit) as exit_:
            start(tiny_config, folder)
    assert exit_.value.code == 128 + signal.SIGINT
    resume(folder)
    runs.require_same(folder, finished)


def test_run_with_many_options_resumes_bitwise(
    tiny_config: config.TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"ema": 0.9, "accumulate": 2, "instances": True, "data_device": "host"}
    options = dataclasses.replace(tiny_config, **changes)
    start(options, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda _: StopAfter(3))
        with pytest.raises(SystemExit):
            start(options, tmp_path / "run", recompute=True)
    resume(tmp_path / "run", recompute=False)  # a resumed run may change this option
    runs.require_same(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize("victim", ["save last", "save best", "metrics", "validation", "step"])
def test_killed_run_resumes_bitwise(
    tiny_config: config.TrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Killed in the second epoch, at each point where files may be incomplete."""
    folder = tmp_path / "run"

    class Killed(BaseException):
        """No `except Exception` catches it."""

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
            start(tiny_config, folder)
    if victim == "metrics":
        with (folder / run_folder.METRICS_FILE).open("a") as file:
            file.write('{"epoch": 1, "half a li')
    resume(folder)
    runs.require_same(folder, finished)


def test_damaged_records_are_dropped_on_resume(finished: Path, tmp_path: Path, capsys) -> None:
    """A line of a finished epoch that a full disk has truncated, and two lines that are not records."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / run_folder.METRICS_FILE).read_text().splitlines()
    damaged = [lines[0].encode(), lines[1][:100].encode(), b"\xff\xfe", b"1", lines[2].encode()]
    (folder / run_folder.METRICS_FILE).write_bytes(b"\n".join(damaged))
    resume(folder)
    assert "3 damaged lines are dropped from the file" in capsys.readouterr().err
    assert (folder / run_folder.METRICS_FILE).read_text() == f"{lines[0]}\n{lines[2]}\n"


def test_other_errors_of_a_resume_are_not_reported_as_damage(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(run.Trainer, "restore", restore)
    with pytest.raises(RuntimeError, match="out of memory"):
        resume(finished)


def test_run_without_checkpoint_starts_over(
    tiny_config: config.TrainConfig, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(tiny_config, folder)
    resume(folder)
    runs.require_same(folder, finished)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)


def test_a_signal_to_the_command_saves_and_prints_the_remedy(tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*TRAIN, *tiny, "--epochs", "10000", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for((folder / run_folder.LAST).exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"continue with: python -m semimoe_fast.train --resume {folder}" in output
    metadata, _ = checkpoint.read(folder / run_folder.LAST)
    assert metadata["epoch"] >= 1


def test_signal_answers_at_once(capfd: pytest.CaptureFixture) -> None:
    stderr = os.dup(2)
    try:
        for lost in (False, True):  # stderr may be a pipe that nobody reads, or a terminal that is gone
            with Interruption(World()) as interruption:
                if lost:
                    os.close(2)
                signal.raise_signal(signal.SIGTERM)
                assert interruption.received == signal.SIGTERM
            os.dup2(stderr, 2)
            assert capfd.readouterr().err == ("" if lost else "\nSIGTERM: a checkpoint follows the next step\n")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(World()) as interruption:
            signal.raise_signal(signal.SIGINT)
        assert not interruption()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C counts, here and in started processes; in a shell's background it is ignored otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_second_interrupt_still_says_how_to_continue(
    tiny_config: config.TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The first Ctrl-C waits for the end of the step, and the second does not."""

    def twice(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.Trainer, "train_step", twice)
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: start(tiny_config, tmp_path / "run"))
    assert exit_.value.code == 130
    hint = f"interrupted; continue with: python -m semimoe_fast.train --resume {tmp_path / 'run'}"
    assert hint in capsys.readouterr().err.splitlines()  # the progress bar may clear itself after it


def test_full_disk_at_a_checkpoint_is_one_line_and_the_run_resumes(
    tiny_config: config.TrainConfig, finished: Path, tmp_path: Path, capsys
) -> None:
    """The limit of a file's size stands for the disk: safetensors reports both in the same way."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: start(tiny_config, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {folder / run_folder.BEST}: File too large; free space on its disk; "
        f"continue with: python -m semimoe_fast.train --resume {folder}"
    )
    assert not [*folder.glob("*.safetensors"), *folder.glob(".*.part")]
    resume(folder)
    runs.require_same(folder, finished)


@pytest.mark.usefixtures("listening")
def test_interrupt_during_imports_is_silent() -> None:
    command = [sys.executable, "-X", "importtime", *TRAIN[1:], "--help"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if "torch.nn.modules" in line:  # while torch is imported, but not in its C code, which ignores errors of NumPy
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_run_killed_at_any_time_resumes_bitwise(tiny_config: config.TrainConfig, tmp_path: Path) -> None:
    """A process killed at an arbitrary time and resumed gives the same run as an uninterrupted one."""
    options = dataclasses.replace(tiny_config, epochs=12)
    (child,) = runs.start(options, tmp_path / "run")
    wait_for((tmp_path / "run" / run_folder.LAST).exists)
    time.sleep(0.2)
    child.kill()
    assert child.wait().status == -signal.SIGKILL, "the run ended before the kill: use more epochs"
    for folder in ("run", "uninterrupted"):
        runs.finish(options, tmp_path / folder)
    runs.require_same(tmp_path / "run", tmp_path / "uninterrupted")


def test_resume_of_a_finished_run_only_reports(finished: Path, tmp_path: Path, capsys) -> None:
    before = (finished / run_folder.LAST).read_bytes()
    resume(finished)
    assert (finished / run_folder.LAST).read_bytes() == before
    assert "last, gated" in capsys.readouterr().out


def test_a_run_whose_checkpoint_is_lost_does_not_start_over(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / run_folder.LAST).unlink()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"last\.safetensors is missing, but 3 epochs were trained: restore it, or"):
        resume(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


def test_a_run_that_only_warms_up_warns(tiny_config: config.TrainConfig, tmp_path: Path, capsys) -> None:
    start(tiny_config, tmp_path / "run", epochs=1, warmup_epochs=2)
    assert (
        "warning: --warmup-epochs is 2 of 1 epochs: --lr only rises to 0; give a smaller number\n"
        in capsys.readouterr().err
    )


def test_supervised_baseline_takes_the_given_steps(tiny_config: config.TrainConfig, tmp_path: Path) -> None:
    start(tiny_config, tmp_path / "r", unlabeled="none", steps_per_epoch=2, epochs=1)
    record = json.loads((tmp_path / "r" / run_folder.METRICS_FILE).read_text())
    assert record["unsupervised_total"] == 0
    assert record["unsupervised_terms"] == [0, 0, 0]
