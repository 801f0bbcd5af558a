"""GlaS and CRAG as they are distributed become the folders that training reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from semimoe_fast import prepare
from semimoe_fast.errors import UserError
from semimoe_fast.prepare import PrepareConfig


def save(path: Path, value: int, channels: tuple[int, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, *channels), value, np.uint8)).save(path)


@pytest.fixture
def glas(tmp_path: Path) -> Path:
    """Every image has a gray level of its own, and its mask the same number as instance id."""
    folder = tmp_path / "archive" / "Warwick QU Dataset (Released 2016_07_08)"
    level = 0
    for prefix, count in (("train", 5), ("testA", 2), ("testB", 1)):
        for number in range(1, count + 1):
            level += 1
            save(folder / f"{prefix}_{number}.bmp", level, (3,))
            save(folder / f"{prefix}_{number}_anno.bmp", level)
    (folder / "Grade.csv").write_text("name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)\n")
    return folder


@pytest.fixture
def crag(tmp_path: Path) -> Path:
    folder = tmp_path / "CRAG_v2" / "CRAG"
    for part, count in (("train", 4), ("valid", 2)):
        for number in range(1, count + 1):
            save(folder / part / "Images" / f"{part}_{number}.png", number, (3,))
            save(folder / part / "Annotation" / f"{part}_{number}.png", number)
            for kind in ("Images", "Annotation"):  # as macOS adds them
                (folder / part / kind / f"._{part}_{number}.png").write_bytes(b"no image")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_glas(glas: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("tyro")
    out = tmp_path / "glas"
    prepare.main(["--source", str(glas.parent), "--out", str(out), "--labeled", "2"])
    assert f"{out / 'train_unsup_3'}: 3 images" in capsys.readouterr().out
    split = json.loads((out / "split.json").read_text())
    assert (split["dataset"], split["seed"], split["source"]) == ("GlaS", 0, str(glas))
    assert {part: len(names) for part, names in split["parts"].items()} == {
        "train_sup_2": 2,
        "train_unsup_3": 3,
        "val": 2,
        "test_b": 1,
    }
    assert sorted(split["parts"]["train_sup_2"] + split["parts"]["train_unsup_3"]) == [
        f"train_{number}.bmp" for number in range(1, 6)
    ]
    assert split["parts"]["val"] == ["testA_1.bmp", "testA_2.bmp"]
    kinds = {"train_unsup_3": ["image"]}
    listed = {
        f"{part}/{kind}/{name}"
        for part, names in split["parts"].items()
        for kind in kinds.get(part, ["image", "mask"])
        for name in names
    }
    assert files(out) == listed | {"split.json"}
    for path in out.glob("*/mask/*"):  # the instance ids, beside their own image
        image = Image.open(path.parents[1] / "image" / path.name)
        assert np.array(Image.open(path)).max() == np.array(image).max()


def test_crag(crag: Path, tmp_path: Path) -> None:
    out = tmp_path / "crag"
    prepared = prepare.prepare(PrepareConfig(crag.parent, out, labeled=1))
    assert prepared == ("CRAG", {"train_sup_1": 1, "train_unsup_3": 3, "val": 2})
    assert (out / "val" / "mask" / "valid_2.png").read_bytes() == (crag / "valid/Annotation/valid_2.png").read_bytes()
    split = json.loads((out / "split.json").read_text())
    assert split["parts"]["val"] == ["valid/Images/valid_1.png", "valid/Images/valid_2.png"]
    assert files(out / "train_unsup_3") == {f"image/{Path(name).name}" for name in split["parts"]["train_unsup_3"]}


def test_names_that_are_not_utf8(crag: Path, tmp_path: Path) -> None:
    for kind in ("Images", "Annotation"):
        (crag / "train" / kind / "train_1.png").rename(crag / "train" / kind / "tr\udce9.png")
    _, counts = prepare.prepare(PrepareConfig(crag, tmp_path / "out", labeled=4))
    assert counts["train_sup_4"] == 4
    assert (tmp_path / "out" / "train_sup_4" / "mask" / "tr\udce9.png").is_file()


def test_a_seed_decides_the_split(glas: Path, tmp_path: Path) -> None:
    def labeled(seed: int, out: str) -> list[str]:
        prepare.prepare(PrepareConfig(glas, tmp_path / out, labeled=2, seed=seed))
        return json.loads((tmp_path / out / "split.json").read_text())["parts"]["train_sup_2"]

    assert labeled(0, "a") == labeled(0, "b") == ["train_1.bmp", "train_3.bmp"]  # for ever, and everywhere
    assert len({tuple(labeled(seed, f"seed{seed}")) for seed in range(4)}) > 1


def test_all_may_be_labeled(crag: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tyro")
    out = tmp_path / "out"
    prepare.main(["--source", str(crag), "--out", str(out), "--labeled", "4"])
    assert not (out / "train_unsup_0").exists()
    assert capsys.readouterr().out.endswith(
        f"train with: python -m semimoe_fast.train --data {out} --unlabeled none --normalization crag\n"
    )


def test_a_folder_in_use_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        assert refused(prepare.prepare, PrepareConfig(tmp_path / "missing", out)) == (
            f"{out} exists and is not an empty folder: choose another --out"
        )


def test_bad_folders_are_refused(glas: Path, crag: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "missing is not a folder" in refused(prepare.prepare, PrepareConfig(tmp_path / "missing", out))
    assert "has neither train_*_anno.bmp (GlaS) nor train/Images (CRAG)" in refused(
        prepare.prepare, PrepareConfig(crag / "train" / "Images", out)
    )
    assert "--labeled is 6: give 1 to 5" in refused(prepare.prepare, PrepareConfig(glas, out, labeled=6))
    (glas / "train_3_anno.bmp").unlink()
    assert "train_3.bmp has no mask train_3_anno.bmp" in refused(prepare.prepare, PrepareConfig(glas, out))
    (glas / "train_3.bmp").unlink()
    (glas / "testB_1.bmp").unlink()
    assert "testB_1_anno.bmp has no image testB_1" in refused(prepare.prepare, PrepareConfig(glas, out))
    (glas / "testB_1_anno.bmp").unlink()
    assert "testB_*.bmp: there is no such file" in refused(prepare.prepare, PrepareConfig(glas, out))
    (crag / "valid" / "Images" / "valid_1.png").unlink()
    assert "valid_1.png has no image valid_1" in refused(prepare.prepare, PrepareConfig(crag, out))
    assert not out.exists()


@pytest.mark.parametrize("name", ["train_1.bmp", "train_1_anno.bmp"])
def test_a_named_pipe_is_refused_before_anything_is_copied(glas: Path, tmp_path: Path, name: str) -> None:
    (glas / name).unlink()
    os.mkfifo(glas / name)
    with pytest.raises(UserError, match=f"{name} is not a file: remove it"):
        prepare.prepare(PrepareConfig(glas, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_labeled_image_is_refused(glas: Path, tmp_path: Path) -> None:
    assert "--labeled is 0: give 1 to " in refused(prepare.prepare, PrepareConfig(glas, tmp_path / "out", labeled=0))
