"""`python -m semimoe_fast.evaluate`: its sources, its files, and one clear line for every bad option."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest

from semimoe_fast import checkpoint, evaluate, predict
from semimoe_fast.errors import UserError
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import run_folder

pytest.importorskip("tyro", reason="commands read their options with tyro")


@pytest.fixture
def of_run(finished: Path, glands_folder: Path) -> list[str]:
    """Options that score the tiny run on images of another size than its own."""
    return ["--checkpoint", str(finished / run_folder.BEST), "--data", str(glands_folder), "--device", "cpu"]


def refused(arguments: list[str]) -> str:
    """The one line of the error of a command that must refuse."""
    with pytest.raises(UserError) as caught:
        evaluate.main(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs(of_run: list[str], tmp_path: Path, capsys) -> None:
    files = {kind: tmp_path / f"scores.{kind}" for kind in ("csv", "json", "report")}
    evaluate.main([*of_run, *(word for kind, path in files.items() for word in (f"--{kind}", str(path)))])
    printed = capsys.readouterr().out
    assert "{" not in printed
    assert "mean object Hausdorff" in printed
    scores = json.loads(files["json"].read_text())
    assert scores["checkpoint"] == of_run[1]
    assert [(row["threshold"], row["swept"]) for row in scores["sets"]] == [
        (0.5, False),
        (scores["predictors"]["gated"]["swept_threshold"], True),
    ]
    assert scores["sets"][0]["pooled"]["dice"]["value"] == scores["predictors"]["gated"]["dice"]
    rows = list(csv.DictReader(files["csv"].open()))
    assert len(rows) == len(scores["images"]) == 2 * (2 + 3)  # images * (gated twice, three experts)
    text = files["report"].read_text()
    assert text.count("data:image/jpeg") == 2
    assert text.count("data:image/png") == 1  # curves of the run
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())


def test_files_of_predict_score_as_their_checkpoint(of_run: list[str], tmp_path: Path, capsys) -> None:
    images = Path(of_run[3]) / "val" / "image"
    predict.main([*of_run[:2], "--device", "cpu", "--input", str(images), "--out", str(tmp_path / "masks")])
    evaluate.main([*of_run, "--json", str(tmp_path / "checkpoint.json")])
    arguments = ["--predictions", str(tmp_path / "masks"), *of_run[2:4], "--json", str(tmp_path / "files.json")]
    capsys.readouterr()
    evaluate.main([*arguments, "--report", str(tmp_path / "report.html")])
    assert "swept" not in capsys.readouterr().out
    of_checkpoint, of_files = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("checkpoint", "files"))
    assert of_files["predictors"] == {}
    assert len(of_files["sets"]) == 1
    assert of_files["sets"][0]["means"] == of_checkpoint["sets"][0]["means"]
    assert of_files["sets"][0]["pooled"] == of_checkpoint["sets"][0]["pooled"]
    assert "data:image/png" not in (tmp_path / "report.html").read_text()  # no run, no curves


def test_without_a_run_folder_there_are_no_curves(finished: Path, tmp_path: Path) -> None:
    tasks = ("mask", "sdf", "boundary")
    assert evaluate.curves_of(finished, tasks).startswith(b"\x89PNG")
    assert evaluate.curves_of(tmp_path, tasks) is None
    lines = (finished / run_folder.METRICS_FILE).read_text().splitlines()
    record = json.loads(lines[0])
    del record["val"]
    (tmp_path / run_folder.METRICS_FILE).write_text(json.dumps(record) + "\n")
    assert evaluate.curves_of(tmp_path, tasks) is None


def test_exactly_one_source_is_given() -> None:
    assert "--checkpoint and --predictions: neither given" in refused(["--data", "none"])
    assert "both given; give exactly one" in refused(["--data", "none", "--checkpoint", "a", "--predictions", "b"])


@pytest.mark.parametrize("option", ["--csv", "--json", "--report"])
def test_output_files_are_checked_first(option: str, tmp_path: Path) -> None:
    arguments = ["--data", "none", "--checkpoint", "none", option]
    for path, message in (
        (tmp_path, "a folder: give a file"),
        (tmp_path / "missing" / "file", "create it first"),
        (Path("/dev/null"), "a device or a pipe"),
    ):
        line = refused([*arguments, str(path)])
        assert line.startswith(f"{option} is {path}")
        assert message in line


def test_a_full_disk_leaves_the_old_file(of_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("old")
    write = Path.write_text

    def full(path: Path, text: str, **options) -> None:
        write(path, text[:10], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        evaluate.main([*of_run, "--csv", str(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
    assert file.read_text() == "old"


def test_missing_predictions_are_named(glands_folder: Path, tmp_path: Path) -> None:
    masks = shutil.copytree(glands_folder / "val" / "mask", tmp_path / "masks")
    (masks / "0001.png").unlink()
    line = refused(["--predictions", str(masks), "--data", str(glands_folder)])
    assert f"{glands_folder / 'val' / 'image' / '0001.png'} has no prediction: add {masks / '0001.png'}" in line


def test_checkpoints_with_other_experts(glands_folder: Path, tmp_path: Path) -> None:
    preprocessing = {"preprocessing": checkpoint.Preprocessing(32, (0.5,) * 3, (0.2,) * 3)._asdict()}
    for tasks, path in ((("mask", "mask", "sdf"), tmp_path / "three"), (("sdf", "boundary"), tmp_path / "none")):
        checkpoint.save(path, SemiMoE(width=2, expert_tasks=tasks), preprocessing)
    arguments = ["--data", str(glands_folder), "--device", "cpu"]
    evaluate.main(["--checkpoint", str(tmp_path / "three"), *arguments, "--json", str(tmp_path / "scores.json")])
    names = set(json.loads((tmp_path / "scores.json").read_text())["predictors"])
    assert names == {"gated", "mask expert 1", "mask expert 2", "sdf expert"}
    assert "no mask" in refused(["--checkpoint", str(tmp_path / "none"), *arguments])


def test_checkpoint_for_gray_images_is_refused(glands_folder: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "gray", SemiMoE(in_channels=1, width=2))
    arguments = ["--checkpoint", str(tmp_path / "gray"), "--data", str(glands_folder), "--device", "cpu"]
    assert "gray: takes images of 1 channels, not RGB" in refused(arguments)
