"""`python -m semimoe_fast.evaluate`: its sources, its files, and one clear line for every bad option."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from refusals import refused

from semimoe_fast import checkpoint, evaluate, predict
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import run_folder
from semimoe_fast.training.config import CONFIG_FILE

pytest.importorskip("tyro", reason="commands read their options with tyro")


@pytest.fixture
def of_run(finished: Path, glands_folder: Path) -> list[str]:
    """Options that score the tiny run on images of another size than its own."""
    return ["--checkpoint", str(finished / run_folder.BEST), "--data", str(glands_folder), "--device", "cpu"]


def test_outputs(of_run: list[str], tmp_path: Path, capsys) -> None:
    files = {kind: tmp_path / f"scores.{kind}" for kind in ("csv", "json", "report")}
    evaluate.main([*of_run, *(word for kind, path in files.items() for word in (f"--{kind}", str(path)))])
    printed = capsys.readouterr().out
    assert "{" not in printed
    assert "mean object Hausdorff" in printed
    scores = json.loads(files["json"].read_text())
    assert scores["checkpoint"] == of_run[1]
    assert [(row["threshold"], row["swept"]) for row in scores["variants"]] == [
        (0.5, False),
        (scores["predictors"]["gated"]["swept_threshold"], True),
    ]
    assert scores["variants"][0]["pooled"]["dice"]["value"] == scores["predictors"]["gated"]["dice"]
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
    assert len(of_files["variants"]) == 1
    assert of_files["variants"][0]["means"] == of_checkpoint["variants"][0]["means"]
    assert of_files["variants"][0]["pooled"] == of_checkpoint["variants"][0]["pooled"]
    assert "data:image/png" not in (tmp_path / "report.html").read_text()  # no run, no curves


def folder_of_known_resolution(root: Path, shapes: Sequence[tuple[int, int]] = ((60, 90), (45, 33))) -> Path:
    """ROOT/val of images of one micron a pixel, and masks with ids."""
    random = np.random.default_rng(0)
    for kind in ("image", "mask"):
        (root / "val" / kind).mkdir(parents=True)
    for name, shape in enumerate(shapes):
        pixels, ids = random.integers(0, 256, (*shape, 3), np.uint8), random.integers(0, 4, shape, np.uint8)
        known = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(root / "val" / "image" / f"{name}.tif", pixels, photometric="rgb", **known)
        tifffile.imwrite(root / "val" / "mask" / f"{name}.tif", ids)
    return root


@pytest.mark.parametrize(
    ("stored", "options", "note"),
    [
        ({"sampling": "crops", "mpp": 2.0}, [], "has 1 microns a pixel and is read at 2 (and 1 more)"),
        ({"sampling": "crops"}, ["--mpp", "0.5"], "has 1 microns a pixel and is read at 0.5 (and 1 more)"),
        ({"sampling": "resize"}, ["--scale", "0.5"], None),
        ({"sampling": "resize"}, [], "is 90 x 60 pixels and resized to the 32 x 32 of the checkpoint"),
    ],
)
def test_a_checkpoint_is_scored_at_the_scale_at_which_it_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture, stored: dict, options: list[str], note: str | None
) -> None:
    """The masks that predict writes have the same scores, at the size of the files."""
    data, model = folder_of_known_resolution(tmp_path / "data"), tmp_path / "model"
    torch.manual_seed(1)
    preprocessing = checkpoint.Preprocessing(32, (0.5,) * 3, (0.2,) * 3, **stored)
    checkpoint.save(model, SemiMoE(width=2), {"preprocessing": preprocessing._asdict()})
    using = ["--checkpoint", str(model), "--device", "cpu", *options]
    predict.main([*using, "--input", str(data / "val" / "image"), "--out", str(tmp_path / "masks")])
    capsys.readouterr()
    scores = []
    for source in (using, ["--predictions", str(tmp_path / "masks")]):
        evaluate.main([*source, "--data", str(data), "--json", str(tmp_path / "scores.json")])
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0]["variants"][0]["pooled"] == scores[1]["variants"][0]["pooled"]
    assert 0.1 < scores[0]["variants"][0]["pooled"]["dice"]["value"] < 0.9
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line and "ids" not in line]
    assert len(warnings) == (note is not None)
    assert all(note in line for line in warnings)
    given = dict(zip([option[2:] for option in options[::2]], map(float, options[1::2]), strict=True))
    assert {name: scores[0][name] for name in ("scale", "mpp") if name in scores[0]} == given


def test_scales_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    arguments = ["--checkpoint", "none", "--data", "none"]
    assert refused(evaluate.main, [*arguments, "--scale", "0"]) == "--scale is 0.0: give a number from 0.01 to 16"
    assert (
        refused(evaluate.main, [*arguments, "--scale", "1", "--mpp", "1"])
        == "--scale and --mpp: both given; give one of them"
    )


def test_curves_are_those_of_the_checkpoints_run(finished: Path, tmp_path: Path, capsys) -> None:
    def drawn(path: Path) -> bytes | None:
        return evaluate.curves_of(path, checkpoint.read(path)[0], ("mask", "sdf", "boundary"))

    assert drawn(finished / run_folder.BEST).startswith(b"\x89PNG")
    alone = Path(shutil.copy(finished / run_folder.BEST, tmp_path))
    assert drawn(alone) is None
    assert "warning" not in capsys.readouterr().err

    def refused_record() -> str:
        assert drawn(alone) is None
        (line,) = capsys.readouterr().err.splitlines()
        return line

    shutil.copy(finished / run_folder.METRICS_FILE, tmp_path)
    assert f"{tmp_path / run_folder.METRICS_FILE} is left out of the report" in refused_record()
    config = json.loads((finished / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"lr": 0.07}))
    assert f"that {alone} is of the same run" in refused_record()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert drawn(alone).startswith(b"\x89PNG")

    record = json.loads((finished / run_folder.METRICS_FILE).read_text().splitlines()[0])
    del record["val"]
    (tmp_path / run_folder.METRICS_FILE).write_text(json.dumps(record) + "\n")
    assert drawn(alone) is None


def test_files_are_written_before_the_tables_are_printed(of_run: list[str], tmp_path: Path, monkeypatch) -> None:
    def closed(*_, **__) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        evaluate.main([*of_run, "--csv", str(tmp_path / "scores.csv")])
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + 2 * (2 + 3)


def test_masks_of_images_that_pillow_cannot_read(tmp_path: Path) -> None:
    """JPEG 2000 in a TIFF, which `predict` reads too."""
    pytest.importorskip("imagecodecs")
    for kind in ("val/image", "val/mask", "masks"):
        (tmp_path / kind).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tifffile.imwrite(tmp_path / "val/image/a.tif", pixels, photometric="rgb", tile=(32, 32), compression="jpeg2000")
    for folder in ("val/mask", "masks"):
        tifffile.imwrite(tmp_path / folder / "a.tif", (pixels[..., 0] > 99).astype(np.uint8))
    report = tmp_path / "report.html"
    evaluate.main(["--predictions", f"{tmp_path}/masks", "--data", str(tmp_path), "--report", str(report)])
    assert "data:image/jpeg" in report.read_text()


def test_tables_are_printed_although_a_file_cannot_be_written(
    of_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate.main([*of_run, "--csv", str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert "95 %" in out
    assert "written" not in out


def test_outputs_replace_no_input_and_no_other_output(
    of_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *_: pytest.fail("scores first"))
    monkeypatch.setattr(evaluate, "evaluate_files", lambda *_: pytest.fail("scores first"))
    same = ["--csv", str(tmp_path / "scores"), "--json", f"{tmp_path}/../{tmp_path.name}/scores"]
    assert refused(evaluate.main, [*of_run, *same]).endswith(
        "/scores, which is the file of --csv too: give another file"
    )
    run, data = Path(of_run[1]).parent, Path(of_run[3])
    inputs = [run / run_folder.BEST, run / run_folder.METRICS_FILE, run / CONFIG_FILE]
    for path in (*inputs, data / "val/image/0000.png", data / "val/mask/0001.png"):
        before = path.read_bytes()
        assert (
            refused(evaluate.main, [*of_run, "--json", str(path)])
            == f"--json is {path}, which is an input too: give another file"
        )
        assert path.read_bytes() == before
    masks = shutil.copytree(data / "val" / "mask", tmp_path / "masks")
    target = (masks / "0001.png").rename(tmp_path / "target.png")
    (masks / "0001.png").symlink_to(target)
    arguments = ["--predictions", str(masks), "--data", str(data), "--report", str(target)]
    assert "which is an input too" in refused(evaluate.main, arguments)


def test_options_of_the_model_need_a_checkpoint() -> None:
    arguments = ["--predictions", "none", "--data", "none"]
    assert (
        refused(evaluate.main, [*arguments, "--device", "cpu"])
        == "--device is cpu, but --predictions needs no model: leave it out"
    )
    assert "--precision is bf16, but" in refused(evaluate.main, [*arguments, "--precision", "bf16"])
    assert "--mpp is 0.5, but" in refused(evaluate.main, [*arguments, "--mpp", "0.5"])


def test_options_reach_the_model(of_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def scored(_, __, ___, device, *options):
        raise Reached(device.type, *options)

    monkeypatch.setattr(evaluate, "evaluate_model", scored)
    with pytest.raises(Reached) as caught:
        evaluate.main([*of_run, "--precision", "bf16", "--scale", "0.5"])
    assert caught.value.args == ("cpu", "bf16", Path(of_run[1]), 0.5, None)


def test_exactly_one_source_is_given() -> None:
    assert "--checkpoint and --predictions: neither given" in refused(evaluate.main, ["--data", "none"])
    assert "both given; give exactly one" in refused(
        evaluate.main, ["--data", "none", "--checkpoint", "a", "--predictions", "b"]
    )


@pytest.mark.parametrize("option", ["--csv", "--json", "--report"])
def test_output_files_are_checked_first(option: str, tmp_path: Path) -> None:
    arguments = ["--data", "none", "--checkpoint", "none", option]
    for path, message in (
        (tmp_path, "a folder: give a file"),
        (tmp_path / "missing" / "file", "create it first"),
        (Path("/dev/null"), "a device or a pipe"),
    ):
        line = refused(evaluate.main, [*arguments, str(path)])
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
    line = refused(evaluate.main, ["--predictions", str(masks), "--data", str(glands_folder)])
    assert f"{glands_folder / 'val' / 'image' / '0001.png'} has no prediction: add {masks / '0001.png'}" in line


def test_checkpoints_with_other_experts(glands_folder: Path, tmp_path: Path) -> None:
    preprocessing = {"preprocessing": checkpoint.Preprocessing(32, (0.5,) * 3, (0.2,) * 3)._asdict()}
    for tasks, path in ((("mask", "mask", "sdf"), tmp_path / "three"), (("sdf", "boundary"), tmp_path / "none")):
        checkpoint.save(path, SemiMoE(width=2, expert_tasks=tasks), preprocessing)
    arguments = ["--data", str(glands_folder), "--device", "cpu"]
    evaluate.main(["--checkpoint", str(tmp_path / "three"), *arguments, "--json", str(tmp_path / "scores.json")])
    names = set(json.loads((tmp_path / "scores.json").read_text())["predictors"])
    assert names == {"gated", "mask expert 1", "mask expert 2", "sdf expert"}
    assert "no mask" in refused(evaluate.main, ["--checkpoint", str(tmp_path / "none"), *arguments])


def test_checkpoint_for_gray_images_is_refused(glands_folder: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "gray", SemiMoE(in_channels=1, width=2))
    arguments = ["--checkpoint", str(tmp_path / "gray"), "--data", str(glands_folder), "--device", "cpu"]
    assert "gray: takes images of 1 channels, not RGB" in refused(evaluate.main, arguments)
