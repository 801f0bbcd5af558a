"""Commands on folders of images, evaluation, prediction, and one clear line for every bad input."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import in_fork, run_module
from PIL import Image
from refusals import refused
from safetensors.torch import save_file

from semimoe_fast import checkpoint, evaluate, predict, train
from semimoe_fast.data.folders import read_image, read_mask
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.training import command_line, config, run_folder
from semimoe_fast.training.lock import FolderLock

pytest.importorskip("tyro", reason="commands read their options with tyro")

SMALL = "--image-size 32 --width 2 --epochs 1 --warmup-epochs 0 --lr 0.1 --device cpu".split()


@pytest.fixture(scope="module")
def folder_run(glands_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "folder"
    train.main(["--data", str(glands_folder), *SMALL, "--out", str(run)])
    return run


def test_folder_with_one_labeled_image_trains(folder_run: Path) -> None:
    metadata, _ = checkpoint.read(folder_run / run_folder.LAST)
    assert metadata["config"]["unlabeled_batch"] == 2
    assert all(0 < mean < 1 for mean in metadata["preprocessing"]["mean"])
    assert metadata["preprocessing"]["image_size"] == 32


def test_resume_takes_moved_but_not_changed_data(
    folder_run: Path, glands_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = shutil.copytree(glands_folder, tmp_path / "moved")
    (moved / "train_sup_9" / "image").mkdir(parents=True)  # the run keeps its own
    train.main(["--resume", str(folder_run), "--data", str(moved)])
    assert "epochs trained before: 1 of 1\n" in capsys.readouterr().out
    shutil.move(moved, tmp_path / "again")
    message = refused(train.main, ["--resume", str(folder_run)])
    assert message == f"--data is {moved}, which is not a folder: give the new path of the data of {folder_run}"
    moved = tmp_path / "again"
    image = next((moved / "train_unsup_4" / "image").iterdir())
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(UserError, match="the images are not those of the checkpoint"):
        train.main(["--resume", str(folder_run), "--data", str(moved)])


def test_validation_on_training_images_is_said_once(
    glands_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (labeled,) = (path.name for path in glands_folder.glob("train_sup_*"))
    train.main(["--data", str(glands_folder), *SMALL, "--val", labeled, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.count(f"warning: --val is {labeled}, whose images are also trained on") == 1


def test_predict_writes_masks_of_the_input_size(folder_run: Path, glands_folder: Path, tmp_path: Path) -> None:
    images = glands_folder / "val" / "image"
    out = tmp_path / "masks"
    arguments = ["--checkpoint", str(folder_run / run_folder.BEST), "--device", "cpu", "--out", str(out)]
    predict.main([*arguments, "--input", str(images), "--overlay"])
    for path in images.iterdir():
        mask = read_mask(out / f"{path.stem}.png")
        assert mask.shape == (40, 40)
        overlay = read_image(out / "overlay" / f"{path.stem}.png")
        border_drawn = (overlay != read_image(path)).any()
        assert border_drawn == (0 < mask.mean() < 1)
    single = next(images.iterdir())
    predict.main([*arguments[:4], "--input", str(single), "--out", str(tmp_path / "one")])
    assert (tmp_path / "one" / f"{single.stem}.png").read_bytes() == (out / f"{single.stem}.png").read_bytes()


def test_predict_never_overwrites_an_image(folder_run: Path, glands_folder: Path) -> None:
    images = glands_folder / "val" / "image"
    before = {path: path.read_bytes() for path in images.iterdir()}
    for given in (images, next(images.iterdir())):
        message = refused(
            predict.main,
            ["--checkpoint", str(folder_run / run_folder.BEST), "--input", str(given), "--out", str(images)],
        )
        assert "masks would replace them" in message
    assert {path: path.read_bytes() for path in images.iterdir()} == before


@pytest.mark.parametrize("command", [evaluate, predict])
def test_predictions_in_fp32_use_no_tf32(command, folder_run: Path, glands_folder: Path, tmp_path: Path) -> None:
    images = ["--input", str(glands_folder / "val" / "image"), "--out", str(tmp_path / "masks")]
    images = images if command is predict else ["--data", str(glands_folder)]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    command.main(["--checkpoint", str(folder_run / run_folder.BEST), "--device", "cpu", "--precision", "fp32", *images])
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def fail_if_decoding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Image, "open", lambda path: pytest.fail(f"{path} is decoded"))


def test_output_paths_are_checked_first(glands_folder: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    fail_if_decoding(monkeypatch)
    file = tmp_path / "file"
    file.touch()
    for command, arguments, message in (
        (train, ["--data", str(glands_folder), *SMALL, "--out", str(finished)], "is not empty; give another --out"),
        (train, ["--data", str(glands_folder), *SMALL, "--out", str(file)], "is a file; give a folder as --out"),
        (train, ["--data", str(glands_folder), *SMALL, "--out", str(tmp_path / "cache")], "decoded images are kept"),
        (
            predict,
            ["--checkpoint", "none", "--input", str(glands_folder / "val" / "image"), "--out", str(file)],
            "a file",
        ),
    ):
        assert message in refused(command.main, arguments)


def test_file_names_that_are_not_utf8(glands_folder: Path, tmp_path: Path, capsys) -> None:
    """Images, masks, data and run folders may have names with Latin-1 bytes, as in old archives."""
    home = tmp_path / os.fsdecode(b"r\xe9sultats")
    data = shutil.copytree(glands_folder, home / "data")
    for path in [*data.glob("*/image/0000.png"), *data.glob("*/mask/0000.png")]:
        path.rename(path.with_name(os.fsdecode(b"l\xe9sion.png")))
    run = ["--checkpoint", str(home / "run" / run_folder.BEST), "--device", "cpu"]
    scores = ["--json", str(home / "scores.json"), "--csv"]
    for command, arguments in (
        (train, ["--data", str(data), *SMALL, "--out", str(home / "run")]),
        (train, ["--resume", str(home / "run")]),
        (evaluate, [*run, "--data", str(data), *scores, str(home / "scores.csv"), "--report", str(home / "page.html")]),
        (predict, [*run, "--input", str(data / "val" / "image"), "--out", str(home / "masks"), "--overlay"]),
    ):
        run_command(lambda command=command, arguments=arguments: command.main(arguments))
    assert "\nl\\udce9sion " in capsys.readouterr().out
    assert "l\\udce9sion" in {row["image"] for row in json.loads((home / "scores.json").read_text())["images"]}
    assert "\nl\\udce9sion," in (home / "scores.csv").read_text()
    assert "l\\udce9sion: pixel Dice" in (home / "page.html").read_text()
    assert (home / "masks" / "overlay" / "l\udce9sion.png").is_file()
    with pytest.raises(SystemExit):
        run_command(lambda: train.main(["--data", str(home), *SMALL]))
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {tmp_path}/r\\udce9sultats/train_sup_N/image is missing: {tmp_path}/r\\udce9sultats has no part"
    )


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 100", "--image-size is 100, not a multiple of 16: try 96 or 112"),
        ("--unlabeled-batch 5", "--unlabeled-batch is 5, but there are 4 unlabeled images: give at most 4"),
        ("--unlabeled none --labeled-batch 3", "--labeled-batch is 3, but there are 2 labeled images"),
        ("--image-size 16 --labeled-batch 1", "batch normalization then sees a single pixel"),
        ("--lr inf", "--lr is inf: give a number from -3.4e+38 to 3.4e+38"),
        ("--lr 1e39", "--lr is 1e+39: give a number from -3.4e+38 to 3.4e+38"),
        ("--coefficients 1 nan 1", "--coefficients is nan: give a number from"),
        ("--coefficients -1 1 1", "--coefficients is (-1.0, 1.0, 1.0): give numbers of 0 or more, not all of them 0"),
        ("--coefficients 0 0 0", "--coefficients is (0.0, 0.0, 0.0): give numbers of 0 or more, not all of them 0"),
        ("--initial-log-var 1000", "--initial-log-var is 1000.0: give a number from -20 to 20"),
        (f"--seed {2**64}", f"--seed is {2**64}: give at most {2**63 - 1}"),
        ("--threads 100000", "--threads is 100000: give at most 1024"),
        ("--image-size 1000000", "--image-size is 1000000: give at most 16384"),
        ("--width 100000", "--width is 100000: give at most 4096"),
        ("--decay -1", "--decay is -1.0: give a factor above 0 and up to 1"),
        ("--epochs 0", "--epochs is 0: give a positive number"),
        ("--threads 0", "--threads is 0: give a positive number"),
        ("--steps-per-epoch 0", "--steps-per-epoch is 0: give a positive number"),
        ("--dropout 1", "--dropout is 1.0"),
        (
            "--schedule cosine --epochs 3 --warmup-epochs 3",
            "--warmup-epochs is 3 of 3 epochs, which leaves none to --schedule cosine: give a smaller number",
        ),
        (
            "--schedule cosine --decay 0.3",
            "--decay is 0.3, which changes nothing with --schedule cosine: leave it out",
        ),
        ("--recipe strong --momentum 0.5", "--momentum is 0.5, which changes nothing with --optimizer adamw"),
        ("--val test", "--val is test, which changes nothing without --data: leave it out"),
        (
            "--unlabeled train_unsup_68",
            "--unlabeled is train_unsup_68, but there is no --data: leave it out, or give none",
        ),
        ("--ema 1", "--ema is 1.0: give a decay between 0 and 1, such as 0.999"),
        ("--accumulate 0", "--accumulate is 0: give a positive number"),
        (
            "--accumulate 2 --labeled-batch 3",
            "--labeled-batch is 3, which --accumulate 2 cannot share: give a multiple",
        ),
        (
            "--recompute --compile default",
            "--recompute has no effect on U-Nets that --compile default compiles: leave out either",
        ),
        ("--momentum -1", "--momentum is -1.0: give 0 or more"),
        ("--synthetic 0 4 2", "at least one labeled and one validation image"),
        ("--device cuda:99", "--device is 'cuda:99', but torch can use"),
        ("--device tpu", "--device is 'tpu'"),
        ("--resume nowhere", "nowhere: holds no run to resume"),
        ("--data glands", "--synthetic is (2, 4, 2), which changes nothing with --data: leave it out"),
    ],
)
def test_bad_configurations_are_refused_before_training(
    tiny: list[str], tmp_path: Path, arguments: str, message: str
) -> None:
    out = tmp_path / "run"
    assert message in refused(train.main, [*tiny, *arguments.split(), "--out", str(out)])
    assert not out.exists()


def test_named_pipe_as_configuration_does_not_hang(tiny: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / config.CONFIG_FILE)
    message = refused(train.main, ["--resume", str(tmp_path)])
    assert f"{tmp_path}: holds no run to resume ({config.CONFIG_FILE} is no file there)" in message


def test_a_file_is_no_run_to_resume(finished: Path) -> None:
    message = refused(train.main, ["--resume", str(finished / run_folder.LAST)])
    assert message == f"{finished / run_folder.LAST}: is a file of a run; give its folder, {finished}"


def test_folder_of_a_run_is_not_overwritten(tiny: list[str], finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    message = refused(train.main, [*tiny, "--out", str(finished)])
    assert f"{finished} is not empty; give another --out, or --resume {finished}" in message
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_help_shows_the_defaults_of_the_data_set(capsys) -> None:
    for arguments, epochs in (
        ([], command_line.SYNTHETIC.epochs),
        (["--data", "None"], command_line.SYNTHETIC.epochs),
        (["--data", "DIR"], 200),
    ):
        with pytest.raises(SystemExit) as exit_:
            command_line.parse([*arguments, "--help"])
        assert exit_.value.code == 0
        assert re.search(rf"--epochs INT[^-]*\(default: {epochs}\)", capsys.readouterr().out)


def test_runs_started_together_get_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with FolderLock() as lock:
        folders = [run_folder.new_folder(command_line.SYNTHETIC, lock) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.parent == Path("runs") for folder in folders)


def test_resume_with_another_configuration_is_refused(finished: Path) -> None:
    message = refused(train.main, ["--resume", str(finished), "--width", "4"])
    assert message == (f"--width is 4, but the run in {finished} was started with 2: leave it out, or start a new run")


def test_checkpoint_of_another_run_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    stored = json.loads((copy / config.CONFIG_FILE).read_text())
    (copy / config.CONFIG_FILE).write_text(json.dumps(stored | {"lr": 0.2}))
    assert "is of another configuration than" in refused(train.main, ["--resume", str(copy)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "0.1"}, 'lr of the configuration is "0.1", not a finite number'),
        ({"width": 2.5}, "width of the configuration is 2.5, not an integer"),
        ({"width": 10**9}, "--width is 1000000000: give at most 4096"),
        ({"epochs": 10**30}, "give at most 2147483647"),
        ({"epochs": None}, "epochs of the configuration is null, not an integer"),
        ({"threads": "1"}, 'threads of the configuration is "1", not an integer or null'),
        ({"synthetic": [2, 4]}, "synthetic of the configuration is [2, 4], not a list of 3, each an integer"),
        ({"coefficients": 1}, "coefficients of the configuration is 1, not a list of 3, each a finite number"),
        ({"precision": ["fp32"]}, "precision of the configuration is [\"fp32\"], not 'auto' or 'fp32' or 'bf16'"),
        ({"sync_bn": "no"}, 'sync_bn of the configuration is "no", not true or false'),
        ({"data": 7}, "data of the configuration is 7, not a path or null"),
        ({"depth": 7}, "has 'depth', which is no option of this version"),
        ("[1]", "the configuration is [1], not an object"),
        ("{}", "the configuration has no"),
        ("{", "is not JSON"),
        (b"\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_damaged_configuration_is_refused(finished: Path, tmp_path: Path, changes, message: str) -> None:
    stored = (finished / config.CONFIG_FILE).read_text()
    text = json.dumps(json.loads(stored) | changes) if isinstance(changes, dict) else changes
    (tmp_path / config.CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(train.main, ["--resume", str(tmp_path)])
    assert message in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({"epoch": "1"}, "", 'epoch of its metadata is "1", not an integer'),
        ({"epoch": 10**9}, "", "is of epoch 1000000000, step 0, which this run does not have"),
        ({"best_dice": None}, "", "best_dice of its metadata is null, not a finite number"),
        ({}, "random.cpu", "its tensors are not those of this run (random.cpu is missing)"),
        ({}, "model.gating.heads.0.bias", "of this run (model.gating.heads.0.bias is missing)"),
        ({}, "optim.model.gating.heads.0.bias.momentum_buffer", "its tensors are not those of this run (optim.model."),
        (
            {},
            "optim.adaptive.log_vars.exp_avg",
            "of this run (optim.adaptive.log_vars.exp_avg is missing)",
        ),
    ],
)
def test_damaged_state_is_refused(finished: Path, tmp_path: Path, changes: dict, without: str, message: str) -> None:
    (tmp_path / config.CONFIG_FILE).write_bytes((finished / config.CONFIG_FILE).read_bytes())
    metadata, tensors = checkpoint.read(finished / run_folder.LAST)
    tensors.pop(without, None)
    save_file(tensors, tmp_path / run_folder.LAST, {checkpoint.METADATA_KEY: json.dumps(metadata | changes)})
    assert message in refused(train.main, ["--resume", str(tmp_path)])


def test_ambiguous_parts_are_listed(glands_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(glands_folder, tmp_path / "two")
    shutil.copytree(folder / "train_sup_1", folder / "train_sup_2")
    assert "nowhere, which is not a folder: give the path" in refused(train.main, ["--data", "nowhere", *SMALL])
    message = refused(train.main, ["--data", str(folder), *SMALL])
    assert "2 parts are named train_sup_*; choose one with --labeled NAME" in message
    assert "(parts of this folder: train_sup_1, train_sup_2)" in message


def test_command_line_shows_one_line_and_no_traceback(tiny: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    (tmp_path / "nothing.file").touch()
    for name, *options in (
        ["train", "--data", missing],
        ["evaluate", "--checkpoint", missing, "--data", missing],
        ["predict", "--checkpoint", missing, "--input", missing, "--out", missing],
        ["train", *tiny, "--out", f"{missing}.file/run"],
    ):
        ended = in_fork(functools.partial(run_module, f"semimoe_fast.{name}", *options))
        assert ended.status == 2
        assert re.fullmatch(r"error: [^\n]+\n", ended.output)
        assert missing in ended.output


def test_the_package_lists_its_commands() -> None:
    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "semimoe_fast", *words], capture_output=True, text=True)

    listed = call()
    names = re.findall(r"^  (\w+)", listed.stdout, re.MULTILINE)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert set(names) == {
        path.stem for path in Path(train.__file__).parent.glob("*.py") if "run_command(main)" in path.read_text()
    }
    wrong = call("train", "--help")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"error: write python -m semimoe_fast.COMMAND, one of {', '.join(names)}\n"
