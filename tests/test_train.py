"""Training from the command line: what a run leaves behind, resuming bitwise, interruption, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from semimoe_fast import checkpoint, config, evaluate, predict, train
from semimoe_fast.data import read_image, read_mask
from semimoe_fast.errors import UserError

TINY = (
    "--synthetic 2 4 2 --image-size 32 --width 2 --epochs 3 --warmup-epochs 1 --lr 0.1 --device cpu --seed 3"
).split()
TRAIN = [sys.executable, "-m", "semimoe_fast.train"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*TINY, "--out", str(folder)])
    return folder


def contents(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return checkpoint.read(path)


def assert_same_run(folder: Path, other: Path) -> None:
    """Model, optimisers, s, position, random state and records, bit for bit (but for the speed)."""
    for name in (train.LAST, train.BEST):
        (metadata, tensors), (expected_metadata, expected) = contents(folder / name), contents(other / name)
        assert metadata == expected_metadata
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    ours, theirs = (
        [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in text.splitlines()]
        for text in ((f / train.METRICS_FILE).read_text() for f in (folder, other))
    )
    assert ours == theirs


def test_run_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {"tensorboard"}
    expected = {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "curves.png", "overlays.png"}
    assert names == expected
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


def test_same_seed_same_run_other_seed_other_run(finished: Path, tmp_path: Path) -> None:
    train.main([*TINY, "--out", str(tmp_path / "same")])
    assert_same_run(tmp_path / "same", finished)
    train.main([*TINY, "--seed", "4", "--out", str(tmp_path / "other")])
    tensors, expected = (contents(folder / train.LAST)[1] for folder in (tmp_path / "other", finished))
    assert not torch.equal(tensors["model.gating.heads.0.weight"], expected["model.gating.heads.0.weight"])


class StopAfter(train.Interruption):
    """An interruption that comes after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        self.received = signal.SIGINT if self.left <= 0 else 0
        return self.left <= 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_interrupted_run_resumes_bitwise(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Two steps an epoch, so that some interruptions fall inside an epoch and some between two."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda: StopAfter(steps))
        with pytest.raises(SystemExit) as exit_:
            train.main([*TINY, "--out", str(folder)])
    assert exit_.value.code == 128 + signal.SIGINT
    train.main(["--resume", str(folder)])
    assert_same_run(folder, finished)


@pytest.mark.parametrize("victim", ["save last", "save best", "metrics", "validation", "step"])
def test_killed_run_resumes_bitwise(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Death in the second epoch, at any of the points that leave something half done on the disk."""
    folder = tmp_path / "run"

    class Killed(BaseException):
        """Nothing catches it, so nothing is cleaned up that SIGKILL would not leave."""

    def dying(function, when):
        def call(*arguments, **keywords):
            if when(*arguments):
                raise Killed
            return function(*arguments, **keywords)

        return call

    in_second_epoch = lambda *_: (folder / train.METRICS_FILE).exists()  # noqa: E731
    with monkeypatch.context() as patch:
        if victim.startswith("save"):
            name = train.LAST if victim == "save last" else train.BEST
            when = lambda path, *_: path.name == name and in_second_epoch()  # noqa: E731
            patch.setattr(checkpoint, "save", dying(checkpoint.save, when))
        elif victim == "validation":
            patch.setattr(train, "count_set", dying(train.count_set, in_second_epoch))
        elif victim == "metrics":
            patch.setattr(train.Run, "record", dying(train.Run.record, in_second_epoch))
        else:
            patch.setattr(train.Trainer, "train_step", dying(train.Trainer.train_step, in_second_epoch))
        with pytest.raises(Killed):
            train.main([*TINY, "--out", str(folder)])
    if victim == "metrics":
        with (folder / train.METRICS_FILE).open("a") as file:
            file.write('{"epoch": 1, "half a li')
    train.main(["--resume", str(folder)])
    assert_same_run(folder, finished)


def test_run_killed_before_its_first_checkpoint_starts_over(finished: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*TINY, "--out", str(folder)])
    train.main(["--resume", str(folder)])
    assert_same_run(folder, finished)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    """A real process: SIGINT and SIGTERM save and say how to go on; after SIGKILL the last checkpoint is whole."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*TRAIN, *TINY, "--epochs", "10000", "--out", str(folder)], stdout=subprocess.PIPE, text=True
    )
    wait_for((folder / train.LAST).exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"continue with: python -m semimoe_fast.train --resume {folder}" in output
    metadata, _ = contents(folder / train.LAST)
    assert metadata["epoch"] >= 1


def test_resume_of_a_finished_run_only_reports(finished: Path, tmp_path: Path, capsys) -> None:
    before = (finished / train.LAST).read_bytes()
    train.main(["--resume", str(finished)])
    assert (finished / train.LAST).read_bytes() == before
    assert "last, gated" in capsys.readouterr().out


def test_supervised_baseline_takes_as_many_steps_as_asked(tmp_path: Path) -> None:
    train.main([*TINY, "--unlabeled", "none", "--steps-per-epoch", "2", "--epochs", "1", "--out", str(tmp_path / "r")])
    record = json.loads((tmp_path / "r" / train.METRICS_FILE).read_text())
    assert record["unsupervised_total"] == 0
    assert record["unsupervised_terms"] == [0, 0, 0]


# folders of images


@pytest.fixture(scope="module")
def glands_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GlaS layout: one labelled image, four unlabelled, two for validation."""
    folder = tmp_path_factory.mktemp("data") / "glands"
    command = [sys.executable, "-m", "semimoe_fast.synthetic", "--out", str(folder)]
    sizes = "--labeled 1 --unlabeled 4 --val 2 --size 40".split()
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    return folder


SMALL = "--image-size 32 --width 2 --epochs 1 --warmup-epochs 0 --lr 0.1 --device cpu".split()


@pytest.fixture(scope="module")
def folder_run(glands_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "folder"
    train.main(["--data", str(glands_folder), *SMALL, "--out", str(run)])
    return run


def test_folder_with_one_labelled_image_trains(folder_run: Path) -> None:
    metadata, _ = contents(folder_run / train.LAST)
    assert metadata["config"]["unlabeled_batch"] == 2
    assert all(0 < mean < 1 for mean in metadata["preprocessing"]["mean"])
    assert metadata["preprocessing"]["image_size"] == 32


def test_data_may_move_but_not_change(folder_run: Path, glands_folder: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(glands_folder, tmp_path / "moved")
    train.main(["--resume", str(folder_run), "--data", str(moved)])
    image = next((moved / "train_unsup_4" / "image").iterdir())
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(UserError, match="is of another data than"):
        train.main(["--resume", str(folder_run), "--data", str(moved)])


def test_evaluate(folder_run: Path, glands_folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--checkpoint", str(folder_run / train.LAST), "--data", str(glands_folder)]
    evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    record = json.loads((folder_run / train.METRICS_FILE).read_text().splitlines()[-1])
    assert scores["all"] == record["val"]  # the trainer's own validation of the same weights
    assert len(scores["images"]) == 2
    printed = capsys.readouterr().out
    assert all(f"all, {name}" in printed for name in scores["all"])
    assert all(name in printed for name in scores["images"])
    assert json.loads(printed.splitlines()[-1]) == scores["all"]


def test_predict_writes_masks_of_the_input_size(folder_run: Path, glands_folder: Path, tmp_path: Path) -> None:
    images = glands_folder / "val" / "image"
    out = tmp_path / "masks"
    arguments = ["--checkpoint", str(folder_run / train.BEST), "--out", str(out)]
    predict.main([*arguments, "--input", str(images), "--overlay"])
    for path in images.iterdir():
        mask = read_mask(out / f"{path.stem}.png")
        assert mask.shape == (40, 40)
        overlay = read_image(out / f"{path.stem}_overlay.png")
        border_drawn = (overlay != read_image(path)).any()
        assert border_drawn == (0 < mask.mean() < 1)
    single = next(images.iterdir())
    predict.main(["--checkpoint", arguments[1], "--input", str(single), "--out", str(tmp_path / "one")])
    assert (tmp_path / "one" / f"{single.stem}.png").read_bytes() == (out / f"{single.stem}.png").read_bytes()


# bad input


def refused(capsys, command, arguments: list[str]) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(UserError) as caught:
        command(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 100", "--image-size is 100, not a multiple of 16: try 96 or 112"),
        ("--unlabeled-batch 5", "--unlabeled-batch is 5, but the part has 4 images"),
        ("--unlabeled none --labeled-batch 3", "--labeled-batch is 3, but the part has 2 images"),
        ("--epochs 0", "--epochs is 0: give a positive number"),
        ("--steps-per-epoch 0", "--steps-per-epoch is 0: give a positive number"),
        ("--dropout 1", "--dropout is 1.0"),
        ("--momentum -1", "--momentum is -1.0: give 0 or more"),
        ("--synthetic 0 4 2", "at least one labelled and one validation image"),
        ("--device cuda:99", "--device is 'cuda:99', but torch sees"),
        ("--device tpu", "--device is 'tpu'"),
        ("--resume nowhere", "nowhere: holds no run to resume"),
        ("--data nowhere", "nowhere"),
    ],
)
def test_bad_configurations_are_refused_before_training(capsys, tmp_path: Path, arguments: str, message: str) -> None:
    out = tmp_path / "run"
    assert message in refused(capsys, train.main, [*TINY, *arguments.split(), "--out", str(out)])
    assert not out.exists()


def test_folder_that_holds_a_run_is_left_alone(capsys, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    message = refused(capsys, train.main, [*TINY, "--out", str(finished)])
    assert f"{finished}: is not empty; give another --out, or --resume {finished}" in message
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resume_with_another_configuration_is_refused(capsys, finished: Path) -> None:
    message = refused(capsys, train.main, ["--resume", str(finished), "--width", "4"])
    assert message == (f"--width is 4, but the run in {finished} was started with 2: leave it out, or start a new run")


def test_checkpoint_of_another_run_is_refused(capsys, finished: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(finished, tmp_path / "copy")
    stored = json.loads((copy / config.CONFIG_FILE).read_text())
    (copy / config.CONFIG_FILE).write_text(json.dumps(stored | {"lr": 0.2}))
    assert "is of another config than" in refused(capsys, train.main, ["--resume", str(copy)])


def test_ambiguous_parts_are_listed(capsys, glands_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(glands_folder, tmp_path / "two")
    shutil.copytree(folder / "train_sup_1", folder / "train_sup_2")
    message = refused(capsys, train.main, ["--data", str(folder), *SMALL])
    assert "2 parts are named train_sup_*; choose one with --labeled NAME" in message
    assert "train_sup_1, train_sup_2, train_unsup_4, val" in message


def test_diverged_loss_ends_the_run_with_a_remedy(capsys, tmp_path: Path) -> None:
    message = refused(capsys, train.main, [*TINY, "--lr", "1e30", "--out", str(tmp_path / "run")])
    assert "restart with a smaller --lr" in message


def test_command_line_shows_one_line_and_no_traceback(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for command in (
        ["train", "--data", missing],
        ["evaluate", "--checkpoint", missing, "--data", missing],
        ["predict", "--checkpoint", missing, "--input", missing, "--out", missing],
    ):
        process = subprocess.run(
            [sys.executable, "-m", f"semimoe_fast.{command[0]}", *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        assert process.returncode == 2
        assert process.stderr.startswith("error: ")
        assert missing in process.stderr
        assert process.stderr.count("\n") == 1
        assert not process.stdout
