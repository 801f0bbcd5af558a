"""The command of benchmarks/peers: runs resume, and their scores are collected."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

from semimoe_fast import checkpoint
from semimoe_fast.data.cache import Cache
from semimoe_fast.errors import UserError
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig

command = pytest.importorskip("benchmarks.peers.__main__", reason="needs the source tree, and tests run from its root")
from benchmarks import record  # noqa: E402
from benchmarks.peers import collect, folds, plot  # noqa: E402
from benchmarks.peers.training import Splits, Training, load_splits  # noqa: E402

CPU = torch.device("cpu")


def options(folder: Path, out: Path, *more: str) -> list[str]:
    return f"--data {folder} --out {out} --image-size 32 --width 4 --epochs 3 --lr 0.1".split() + list(more)


@pytest.mark.parametrize(
    "method",
    [
        ["--method", "mean-teacher"],  # has random noise, a teacher, and counts its steps
        ["--method", "semi-moe", "--recipe", "strong", "--without", "schedule"],  # has AdamW and an EMA
    ],
    ids=" ".join,
)
def test_runs_resume_and_are_not_repeated(
    method: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    command.main(options(folder, tmp_path / "undisturbed", *method))
    epoch = Training.train_epoch

    def interrupted(training: Training) -> None:
        if training.epoch == 2:
            raise KeyboardInterrupt
        epoch(training)

    monkeypatch.setattr(Training, "train_epoch", interrupted)
    monkeypatch.setattr(command, "commit", lambda: "first")
    with pytest.raises(KeyboardInterrupt):
        command.main(options(folder, tmp_path / "runs", *method))
    monkeypatch.setattr(Training, "train_epoch", epoch)
    monkeypatch.setattr(command, "commit", lambda: "second")
    (state,) = (tmp_path / "runs").glob("*.safetensors")
    claim = command.Claim(state.with_suffix(".lock"))
    command.main(options(folder, tmp_path / "runs", *method))
    assert "is being trained by another process" in capsys.readouterr().out
    claim.close()
    command.main(options(folder, tmp_path / "runs", *method))
    (resumed,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(resumed.read_text())
    assert [origin["commit"] for origin in record["origins"]] == ["first", "second"]
    averaged = [key for key in checkpoint.read(state, CPU)[1] if key.startswith("average.")]
    assert bool(averaged) == ("strong" in method)
    chosen = {key: record["arguments"].get(key) for key in ("recipe", "lr", "optimizer", "schedule")}
    strong = {"recipe": "strong without schedule", "lr": 0.1, "optimizer": "adamw", "schedule": "steps"}
    assert chosen == (strong if "strong" in method else dict.fromkeys(chosen) | {"lr": 0.1})
    right = json.loads((tmp_path / "undisturbed" / resumed.name).read_text())
    assert record["scores"] == right["scores"]
    assert record["curve"] == right["curve"]
    assert [point["epoch"] for point in record["curve"]] == [1, 2, 3]
    assert record["steps"] == 3 * 2  # two steps an epoch
    names = {path.stem for path in folder.rglob("*.png")}
    assert not any(f'"{name}"' in resumed.read_text() for name in names), "only hashes of names are recorded"

    monkeypatch.setattr(Training, "train_epoch", interrupted)
    capsys.readouterr()
    command.main(options(folder, tmp_path / "runs", *method))
    assert "is finished" in capsys.readouterr().out

    state.write_bytes(state.read_bytes()[:1000])
    resumed.unlink()
    with pytest.raises(UserError, match=r"not a readable checkpoint .*; remove it to train anew"):
        command.main(options(folder, tmp_path / "runs", *method))


def test_the_machine_has_a_name_without_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(record.platform, "processor", lambda: "arm")
    assert record.machine(1) == "arm, 1 thread"
    assert record.machine(2) == "arm, 2 threads"


def test_the_machine_has_the_generation_of_its_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n"
    monkeypatch.setattr(record, "CPUINFO", tmp_path / "cpuinfo")
    record.CPUINFO.write_text(text.format(0, 25, 17) + text.format(1, 99, 99))
    assert record.machine(1) == "AMD EPYC (family 25, model 17), 1 thread"


def test_only_a_held_lock_is_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("no locks here")

    monkeypatch.setattr(command, "lock", fail)
    with pytest.raises(UserError, match="no locks here"):
        command.Claim(tmp_path / "run.lock")


def test_runs_on_other_devices_are_other_runs(config: TrainConfig) -> None:
    cpu, *others = (
        command.arguments_of(config, "published", torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")
    )
    assert (cpu["device"], cpu["precision"]) == ("cpu", "fp32")
    assert [(other["device"], other["precision"]) for other in others] == [("cuda", "bf16")] * 2


def test_collected_scores_are_those_of_the_runs(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    runs = tmp_path / "runs"
    command.main(options(folder, runs, "--method", "supervised", "semi-moe", "--seed", "0", "1", "--epochs", "1"))
    collect.main([str(runs), "--out", str(tmp_path / "accuracy" / "tiny.json")])
    tables = json.loads((tmp_path / "accuracy" / "tiny.json").read_text())["tables"]
    (line,) = json.loads((tmp_path / "accuracy" / "tiny.json").read_text())["command"]
    assert line.endswith("--recipe published --lr 0.1 --method semi-moe supervised --seed 0 1")
    assert command.read_options(command.Options, "", line.split()[3:]).seed == (0, 1), "it can be run as recorded"
    dice = [json.loads(path.read_text())["scores"]["at_half"]["dice"] for path in runs.glob("supervised*.json")]
    ((method, lr, count, cell, *_), _) = tables["scores"]["rows"]
    assert (method, lr, count) == ("supervised", 0.1, 2)
    assert cell == f"{statistics.mean(dice):.4f} ± {statistics.stdev(dice):.4f}"
    with_tta = [row[3] for row in tables["scores_with_tta"]["rows"]]
    assert len(with_tta) == 2
    assert with_tta != [row[3] for row in tables["scores"]["rows"]]
    assert [row[2] for row in tables["unlabeled"]["rows"]] == [row[2] for row in tables["scores"]["rows"]]
    assert tables["splits"]["rows"][0][:3] == ["runs", "labeled", 3]
    ends = [json.loads(path.read_text())["curve"][-1] for path in sorted(runs.glob("semi-moe*.json"))]
    watched = [(end["dead_channels"], end["loss_weights"], end["gate_weights"][0]) for end in ends]
    assert tables["experts"]["rows"] == [
        ["runs", "semi-moe", seed, 0.1, *(" ".join(f"{x:.3g}" for x in values) for values in of_run)]
        for seed, of_run in enumerate(watched)
    ]
    plot.main([str(runs), "--out", str(tmp_path / "pictures" / "curves.png")])
    assert Image.open(tmp_path / "pictures" / "curves.png").width > 1000
    command.main(options(folder, runs, "--method", "supervised", "--epochs", "2"))
    with pytest.raises(UserError, match="has another epochs"):
        collect.main([str(runs), "--out", str(tmp_path / "tiny.json")])


def test_commands_name_recipe_and_seeds() -> None:
    def run(method: str, seed: int, lr: float, **more: str) -> dict[str, object]:
        options = {"epochs": 1, "width": 2, "image_size": 32, "normalization": "glas", "device": "cpu", "lr": lr}
        return {"method": method, "seed": seed, "arguments": options | more}

    left_out = "strong without ema, lr"
    runs = [run("cps", 0, 0.5), run("cps", 1, 0.5), run("cps", 0, 2.0), run("cps", 1, 0.5, recipe=left_out)]
    assert [line.split("--device cpu ")[1] for line in collect.commands(runs)] == [
        "--recipe published --lr 0.5 --method cps --seed 0 1",
        "--recipe published --lr 2.0 --method cps --seed 0",
        "--recipe strong --without ema lr --lr 0.5 --method cps --seed 1",
    ]


@pytest.mark.parametrize(("name", "value"), [("ema", 0.9), ("stain", 0.1)])
def test_unlike_runs_are_not_averaged(
    name: str, value: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second recipe has another value, or an option that the first one did not have."""
    pytest.importorskip("tyro")
    arguments = options(folder, tmp_path / "runs", "--method", "supervised", "--epochs", "1", "--recipe", "strong")
    command.main(arguments)
    monkeypatch.setitem(RECIPES["strong"], name, value)
    command.main([*arguments, "--seed", "1"])
    with pytest.raises(UserError, match=f"has another {name} than"):
        collect.main([str(tmp_path / "runs"), "--out", str(tmp_path / "tiny.json")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--without", "ema"], "--without leaves out options of --recipe strong: give that too"),
        (["--recipe", "strong", "--without", "width"], "--without is width: choose from optimizer, lr, "),
    ],
)
def test_options_that_are_not_of_the_recipe_are_refused(folder: Path, tmp_path: Path, more: list[str], message: str):
    pytest.importorskip("tyro")
    with pytest.raises(UserError, match=message):
        command.main(options(folder, tmp_path, *more))


def test_curves_are_means_over_seeds() -> None:
    def run(seed: int, method: str, **values: float) -> dict:
        curve = [{"epoch": epoch, "dice": 0.1 * epoch + seed, **values} for epoch in (2, 4)]
        more = {"loss_weights": [1 + seed, 2, 3], "gate_weights": [[0.5, 0.3, 0.2 + seed]] * 3}
        if method == "semi-moe":
            curve = [point | more for point in curve]
        return {"method": method, "seed": seed, "arguments": {"lr": 0.5}, "curve": curve}

    runs = [run(seed, "semi-moe") for seed in (0, 1)] + [run(0, "cps", unlabeled_dice=0.7)]
    val, unlabeled, losses, gates = plot.draw(runs).axes
    moe, cps = sorted(val.lines, key=lambda line: "cps" in line.get_label())
    assert moe.get_xdata().tolist() == [2, 4]
    assert moe.get_ydata() == pytest.approx([0.7, 0.9])
    assert cps.get_ydata() == pytest.approx([0.2, 0.4])
    assert [line.get_ydata().tolist() for line in unlabeled.lines] == [[0.7, 0.7]]
    assert [line.get_ydata()[0] for line in losses.lines] == pytest.approx([1.5, 2, 3])
    assert [line.get_ydata()[0] for line in gates.lines] == pytest.approx([0.5, 0.3, 0.7])


def test_each_labeled_image_is_held_out_once(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    folds.main(["--data", str(folder), "--out", str(tmp_path), "--folds", "2"])
    held_out = []
    for fold in sorted(tmp_path.iterdir()):
        mine = {path.resolve() for path in (fold / "val" / "image").iterdir()}
        (kept,) = fold.glob("train_sup_*")
        assert kept.name == f"train_sup_{3 - len(mine)}"
        assert not mine & {path.resolve() for path in (kept / "image").iterdir()}
        assert len([*(kept / "mask").iterdir()]) == 3 - len(mine)
        assert len([*(fold / "train_unsup_4" / "mask").iterdir()]) == 4
        held_out += mine
    assert sorted(held_out) == sorted((folder / "train_sup_3" / "image").iterdir())
    assert not {*held_out} & {*(folder / "val" / "image").iterdir()}
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))} exists and is not an empty folder: choose"):
        folds.main(["--data", str(folder), "--out", str(tmp_path), "--folds", "2"])


def test_a_row_of_a_file_is_a_line() -> None:
    rows = [["a  b", 1.5, None], ["c", 2, True]]
    text = record.as_json({"command": ["x"], "tables": {"t": {"columns": [], "rows": rows}}})
    assert json.loads(text)["tables"]["t"]["rows"] == rows
    assert [line.strip() for line in text.splitlines() if "1.5" in line or '"c"' in line] == [
        '["a  b", 1.5, null],',
        '["c", 2, true]',
    ]


def test_runs_of_all_recipes_and_methods_are_collected_from_one_folder(folder: Path, tmp_path: Path) -> None:
    """The images of a recipe are stored at other sizes, and those of the upper bound have masks."""
    pytest.importorskip("tyro")
    runs = tmp_path / "runs"
    for more in (["supervised"], ["supervised", "--recipe", "strong"], ["supervised", "supervised-all"]):
        command.main(options(folder, runs, "--epochs", "1", "--method", *more))
    collect.main([str(runs), "--out", str(tmp_path / "tiny.json")])
    rows = json.loads((tmp_path / "tiny.json").read_text())["tables"]["scores"]["rows"]
    assert [row[0] for row in rows] == ["supervised", "supervised-all", "supervised, strong"]
    assert [row[2] for row in rows] == [1, 1, 1], "no run is trained twice"


def test_other_files_are_other_splits(folder: Path, config: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    masks = sorted((tmp_path / "data/val/mask").iterdir())
    shutil.copyfile(masks[0], masks[1])
    changed = load_splits(dataclasses.replace(config, data=tmp_path / "data"), Cache(tmp_path), all_labels=True)
    assert {part for part, values in splits.described.items() if values != changed.described[part]} == {"val"}
    assert changed.described["val"]["names_sha256"] == splits.described["val"]["names_sha256"]


def test_runs_of_an_older_version_are_named(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    command.main(options(folder, tmp_path, "--epochs", "1", "--method", "supervised"))
    (path,) = tmp_path.glob("*.json")
    older = json.loads(path.read_text())
    del older["origins"]
    path.write_text(json.dumps(older))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is of an older version: train it again"):
        collect.main([str(tmp_path), "--out", str(tmp_path / "tiny.json")])
