"""The layout of GlaS that the measurements used."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semimoe_fast.data.folders import read_image, read_mask
from semimoe_fast.data.listing import list_images
from semimoe_fast.errors import UserError
from semimoe_fast.training.sources import only_part

glas256 = pytest.importorskip("benchmarks.glas256", reason="needs the source tree, and tests run from its root")
RESULTS = Path(glas256.__file__).parent / "results" / "accuracy"
HEIGHT, WIDTH = 40, 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GlaS in name and number of its images, whose masks hold ids."""
    pytest.importorskip("tyro")
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    for prefix, count in (("train", 85), ("testA", 60), ("testB", 20)):
        for number in range(1, count + 1):
            pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{prefix}_{number}.bmp")
            ids = np.full((HEIGHT, WIDTH), number % 3, np.uint8)
            ids[:, : WIDTH // 2] = 5
            Image.fromarray(ids).save(folder / f"{prefix}_{number}_anno.bmp")
    return folder


@pytest.fixture(scope="module")
def laid_out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    glas256.main(["--source", str(source), "--out", str(out)])
    return out


def names(part: Path) -> list[str]:
    images, masks = ([path.stem for path in list_images(part / kind)] for kind in ("image", "mask"))
    assert images == masks
    return images


def test_split_is_that_of_the_measurements(laid_out):
    for results in ("glas", "methods"):
        record = json.loads((RESULTS / f"{results}.json").read_text())
        table = record["tables"]["splits"]
        (digest,) = {row[-1] for row in table["rows"] if row[-2] == 17}
        assert hashlib.sha256("\n".join(names(laid_out / "train_sup_17")).encode()).hexdigest() == digest
    both = names(laid_out / "train_sup_17") + names(laid_out / "train_unsup_68")
    assert sorted(both) == sorted(names(laid_out / "train_all_85"))
    assert len(names(laid_out / "val")) == 60
    assert only_part(laid_out, "train_sup_", "--labeled") == "train_sup_17"  # which commands take without --labeled


def test_files_are_binary_squares_and_native_ones(laid_out):
    image, mask = (laid_out / "val" / kind / "testA_3.png" for kind in ("image", "mask"))
    assert read_image(image).shape == (256, 256, 3)
    assert (read_mask(mask) == (np.arange(256) < 128)).all()  # 3 % 3 is background
    with Image.open(mask) as opened:
        assert opened.getextrema() == (0, 255)
    assert names(laid_out / "native") == [f"testA_{number}" for number in range(1, 7)]
    assert read_image(laid_out / "native" / "image" / "testA_3.png").shape == (HEIGHT, WIDTH, 3)


def test_used_folder_is_refused(laid_out):
    with pytest.raises(UserError, match="is not an empty folder: choose another --out"):
        glas256.main(["--source", str(laid_out), "--out", str(laid_out)])


def test_another_data_set_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "other")
    for path in (tmp_path / "other").glob("train_66*"):
        path.rename(path.with_name(path.name.replace("66", "99")))
    with pytest.raises(UserError, match="lacks train_66: give --source the folder of GlaS as it was unpacked"):
        glas256.main(["--source", str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
