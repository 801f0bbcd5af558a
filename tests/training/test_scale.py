"""Runs with --mpp, and the resolution that a run reads from its files: images, masks, validation and what is stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from refusals import refused

from semimoe_fast import checkpoint, train
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.readers import open_image
from semimoe_fast.data.scaled import size_at
from semimoe_fast.errors import UserError
from semimoe_fast.training import run_folder
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data

PARTS = {"train_sup_2": (0.25, 0.5), "train_unsup_2": (0.25, 0.5), "val": (0.25, 1.0)}  # microns a pixel of the images
SHAPES = (95, 133), (64, 70)


def save_image(path: Path, pixels: np.ndarray, mpp: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, photometric="rgb", **known)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts of two images, TIFF files that say their resolution in tags, and masks of ids."""
    random = np.random.default_rng(0)
    for part, microns in PARTS.items():
        for name, (shape, mpp) in enumerate(zip(SHAPES, microns, strict=True)):
            save_image(tmp_path / part / "image" / f"{name}.tif", random.integers(0, 256, (*shape, 3), np.uint8), mpp)
            mask = tmp_path / part / "mask" / f"{name}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 5, shape, np.uint8)).save(mask)
    return tmp_path


@pytest.fixture
def crops(tiny_config: TrainConfig, folder: Path) -> TrainConfig:
    return dataclasses.replace(
        tiny_config, data=folder, sampling="crops", instances=True, steps_per_epoch=2, unlabeled_batch=2
    )


def assert_read_at(config: TrainConfig, part: str, index: int, images, mpp: float) -> None:
    """An image is that of `open_image`; each pixel of its mask is the one of the file that holds its center."""
    with open_image(config.data / part / "image" / f"{index}.tif", mpp=mpp) as reader:
        size = reader.size
        assert np.array_equal(images.image(index), reader.read(0, 0, *size))
    if images.masks is not None:
        mask = np.asarray(Image.open(config.data / part / "mask" / f"{index}.png"))
        rows, columns = (((np.arange(t) + 0.5) * s / t).astype(int) for s, t in zip(mask.shape, size, strict=True))
        assert np.array_equal(images.mask(index), mask[rows[:, None], columns])


def test_images_are_resampled_to_the_given_microns(crops: TrainConfig, tmp_path: Path) -> None:
    given = dataclasses.replace(crops, mpp=0.5)
    cache = Cache(tmp_path / "cache")
    for data, val in (load_data(given), load_data(given, cache), load_data(given, cache)):
        assert data.labeled.sizes.tolist() == [[48, 66], [64, 70]]  # half of 95 x 133, and as it is
        for part, images in zip(PARTS, (data.labeled, data.unlabeled, val), strict=True):
            assert_read_at(given, part, 0, images, 0.5)
            assert_read_at(given, part, 1, images, 0.5)
        assert data.preprocessing[5:] == ("crops", True, pytest.approx(0.75), 0.5)
        assert data.note == "4 images of 0.25 to 1 microns a pixel are resampled to 0.5"
    plain = load_data(crops, cache)[0]
    assert plain.labeled.sizes.tolist() == [list(shape) for shape in SHAPES]
    assert load_data(dataclasses.replace(crops, mpp=1.0), cache)[0].labeled.sizes.tolist() == [[24, 33], [32, 35]]
    assert len(list(cache.folder.iterdir())) == 9  # no two of these share images


def test_without_mpp_validation_reads_images_as_predict_does(crops: TrainConfig) -> None:
    """The labeled images have 0.25 and 0.5 microns a pixel; their median is what the checkpoint stores."""
    data, val = load_data(crops)
    assert data.preprocessing[5:] == ("crops", False, 1.0, pytest.approx(0.375))
    for index in range(2):
        assert_read_at(crops, "val", index, val, 0.375)
    assert data.note == "2 images of 0.25 to 1 microns a pixel are resampled to 0.375"


def test_images_of_unknown_resolution(crops: TrainConfig, folder: Path) -> None:
    """--mpp refuses them; without it, they are read as they are."""
    path = folder / "train_unsup_2" / "image" / "1.tif"
    save_image(path, tifffile.imread(path), None)
    assert refused(load_data, dataclasses.replace(crops, mpp=0.5)).startswith(
        f"{path} does not say how large its pixels are, which --mpp needs: save it"
    )
    for part in ("train_sup_2", "val"):
        path = folder / part / "image" / "1.tif"
        save_image(path, tifffile.imread(path), None)
    data, val = load_data(crops)
    assert data.preprocessing.mpp is None
    assert val.sizes.tolist() == [list(shape) for shape in SHAPES]
    save_image(folder / "train_sup_2" / "image" / "1.tif", data.labeled.image(1).numpy(), 0.25)
    data, val = load_data(crops)
    assert data.preprocessing.mpp == pytest.approx(0.25)
    assert data.note is None
    assert torch.equal(val.image(1), load_data(crops)[1].image(1))


def test_a_run_says_and_stores_its_scale(crops: TrainConfig, tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs" / "one"
    train.main(dataclasses.replace(crops, mpp=0.5, epochs=1, warmup_epochs=0, out=out))
    assert "4 images of 0.25 to 1 microns a pixel are resampled to 0.5\n" in capsys.readouterr().out
    metadata, _ = checkpoint.read(out / run_folder.BEST)
    assert metadata["config"]["mpp"] == 0.5
    preprocessing = Preprocessing.of(out, metadata)
    assert (preprocessing.mpp, preprocessing.scale, preprocessing.antialias) == (0.5, pytest.approx(0.75), True)


@pytest.mark.parametrize(
    ("own", "mpp", "size"),
    [
        (None, 0.5, (90, 50)),
        (0.25, None, (90, 50)),
        (0.496, 0.5, (90, 50)),
        (0.25, 0.26, (87, 48)),
        (9.9, 10.0, (90, 50)),
        (0.25, 0.5, (45, 25)),
        (8.0, 0.5, (1440, 800)),
        (0.15, 15.0, (1, 1)),
    ],
)
def test_sizes(own: float | None, mpp: float | None, size: tuple[int, int]) -> None:
    assert size_at(Path("a.tif"), (90, 50), own, mpp) == size


def test_absurd_resolution_is_refused() -> None:
    with pytest.raises(UserError, match=r"a.tif has 20 microns a pixel and would be read at 0.02, "):
        size_at(Path("a.tif"), (90, 50), 20.0, 0.02)
