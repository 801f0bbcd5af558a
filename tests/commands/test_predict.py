"""`python -m semimoe_fast.predict --instances`: its files agree with each other, and what it refuses."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import predictions
import pytest
import torch
from PIL import Image
from refusals import refused

from semimoe_fast import checkpoint, evaluate, predict
from semimoe_fast.data import augment
from semimoe_fast.data.folders import read_image, read_mask, resize_image
from semimoe_fast.data.readers import mpp_of, open_image
from semimoe_fast.inference import instances_of, polygons_of
from semimoe_fast.inference.outputs import write_labels, write_overlay
from semimoe_fast.inference.overlay import outline
from semimoe_fast.model import SemiMoE

pytest.importorskip("tyro", reason="commands read their options with tyro")
pytest.importorskip("skimage", reason="instances need scikit-image")


save_model = functools.partial(predictions.save_model, sampling="resize", antialias=False)  # many small objects


def options(model: Path, images: Path, out: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(model), "--input", str(images), "--out", str(out), "--device", "cpu", *more]


def test_instances_of_images(glands_folder: Path, tmp_path: Path) -> None:
    """The mask is the same as without --instances; label image, polygons and overlay show the same objects."""
    model, images = save_model(tmp_path / "model"), glands_folder / "val" / "image"
    plain, out = tmp_path / "plain", tmp_path / "out"
    predict.main(options(model, images, plain))
    predict.main(options(model, images, out, "--instances", "--least-area", "4", "--overlay"))
    found = 0
    for path in images.iterdir():
        mask_file = out / f"{path.stem}.png"
        assert mask_file.read_bytes() == (plain / mask_file.name).read_bytes()
        stored = Image.open(out / "instances" / f"{path.stem}.png")
        assert stored.mode == "I;16"
        labels = np.array(stored)
        assert labels.dtype == np.uint16
        assert labels.shape == read_image(path).shape[:2]
        assert read_mask(mask_file)[labels > 0].all()
        areas = np.bincount(labels.ravel())[1:]
        assert (areas >= 4).all()
        features = json.loads((out / "instances" / f"{path.stem}.geojson").read_text())["features"]
        assert len(features) == len(areas)
        coordinates = [f["geometry"]["coordinates"] for f in features]
        expected = [[[ring.tolist() for ring in polygon] for polygon in x] for x in polygons_of(labels).values()]
        assert coordinates == [x if len(x) > 1 else x[0] for x in expected]
        assert (read_image(out / "overlay" / f"{path.stem}.png") == outline(read_image(path), labels)).all()
        found += len(areas)
    assert found > 2
    names = {path.stem for path in images.iterdir()}
    for folder, count in ((out, 1), (out / "overlay", 1), (out / "instances", 2)):
        files = [path.stem for path in folder.iterdir() if path.is_file()]
        assert sorted(files) == sorted([*names] * count)
    for folder in (out, out / "instances"):  # evaluate takes them as they are
        evaluate.main(["--data", str(glands_folder), "--predictions", str(folder)])


def test_instances_follow_the_predicted_field(glands_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The sdf is tanh of the gated output at the size of the image, or the distance if there is no sdf expert."""
    image = next((glands_folder / "val" / "image").iterdir())
    given: list = []

    def spy(mask: np.ndarray, sdf: torch.Tensor, *settings: float) -> np.ndarray:
        given[:] = mask, np.asarray(sdf), *settings
        return instances_of(mask, sdf, *settings)

    monkeypatch.setattr(predict, "instances_of", spy)
    size = (48, 32, 3)
    Image.fromarray(np.array(Image.open(image).resize((size[1], size[0])))).save(tmp_path / "image.png")
    arguments = (tmp_path / "image.png", tmp_path / "out", "--instances", "--seed-level", "0.2", "--overwrite")

    path = save_model(tmp_path / "model")
    predict.main(options(path, *arguments))
    model, metadata, _ = checkpoint.load(path)
    preprocessing = checkpoint.Preprocessing.of(path, metadata)
    square = resize_image(read_image(tmp_path / "image.png"), 32)[None]
    with torch.no_grad():
        output = model(augment.normalize(square, preprocessing.mean, preprocessing.std))
    sdf = torch.nn.functional.interpolate(output.sdf.tanh(), size[:2], mode="bilinear")[0, 0]
    assert np.abs(given[1] - sdf.numpy()).max() < 1e-5  # batch normalization is folded into the convolutions
    assert given[2:] == [0.2, 100]

    predict.main(options(save_model(tmp_path / "no_sdf", ("mask", "boundary")), *arguments))
    mask, distance = given[:2]
    assert 0 < mask.mean() < 1
    assert np.array_equal(distance > 0, mask)
    assert distance.max() > 1


def test_touching_objects_are_outlined_apart() -> None:
    labels = np.zeros((8, 9), int)
    labels[1:7, 1:4], labels[1:7, 4:8] = 1, 2
    drawn = outline(np.zeros((8, 9, 3), np.uint8), labels)[..., 1] > 0
    inner = np.zeros((8, 9), bool)
    inner[2:6, 2] = inner[2:6, 5:7] = True
    assert np.array_equal(drawn, (labels > 0) & ~inner)


@pytest.mark.parametrize(("width", "thickness"), [(1999, 1), (4000, 4)])
def test_outlines_of_large_images_are_wide(tmp_path: Path, width: int, thickness: int) -> None:
    Image.new("RGB", (width, 40)).save(tmp_path / "image.png")
    labels = np.zeros((40, width), np.uint8)
    labels[10:30, 100:-100] = 1
    with open_image(tmp_path / "image.png") as image:
        write_overlay(image, labels, tmp_path / "overlay.png")
    drawn = read_image(tmp_path / "overlay.png")[:, 500, 1] > 0
    assert np.flatnonzero(drawn).tolist() == [*range(10, 10 + thickness), *range(30 - thickness, 30)]


def test_many_labels_are_written_with_32_bits(tmp_path: Path) -> None:
    labels = np.arange(70_000, dtype=np.int32).reshape(200, 350)
    for count, name, dtype in ((65_535, "a.b.png", np.uint16), (65_536, "a.b.tif", np.uint32)):
        write_labels(tmp_path / "a.b.png", np.minimum(labels, count), mpp=0.5)
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(np.array(image), np.minimum(labels, count).astype(dtype))
    assert mpp_of(tmp_path / "a.b.tif") == 0.5


def test_outputs_that_would_replace_images_are_refused(tmp_path: Path) -> None:
    images = tmp_path / "instances"
    images.mkdir()
    (images / "a.png").touch()
    arguments = options(Path("none"), images, tmp_path)
    assert refused(predict.main, [*arguments, "--instances"]) == (
        f"{images} is the folder of the images: masks would replace them, give another --out"
    )
    assert "none does not exist" in refused(predict.main, [*arguments, "--overlay"])
    (tmp_path / "overlay").touch()
    assert refused(predict.main, [*arguments, "--overlay"]) == (
        f"{tmp_path / 'overlay'} is a file, not a folder: remove it, or give another --out"
    )


def test_bad_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    arguments = options(Path("none"), tmp_path / "image.png", tmp_path / "out", "--instances")
    for given, message in (
        ("--seed-level 1", "--seed-level is 1.0: give a number from 0 to below 1"),
        ("--seed-level nan", "--seed-level is nan: give a number from 0 to below 1"),
        ("--least-area -1", "--least-area is -1: give 0 or more"),
    ):
        assert refused(predict.main, [*arguments, *given.split()]) == message


@pytest.mark.parametrize("head", ["mask", "sdf"])
def test_checkpoint_that_predicts_nan_is_refused(glands_folder: Path, tmp_path: Path, head: str) -> None:
    model = SemiMoE(width=2)
    weight = model.gating.heads[model.tasks.index(head)].weight.data
    weight.copy_(torch.tensor([3e38, -3e38]).view(1, 2, 1, 1).expand_as(weight))  # the sum overflows
    path = save_model(tmp_path / "model")
    _, metadata, _ = checkpoint.load(path)
    del metadata["format"], metadata["model"]
    checkpoint.save(path, model, metadata)
    image = next((glands_folder / "val" / "image").iterdir())
    message = refused(predict.main, options(path, image, tmp_path / "out", "--instances"))
    assert message == f"{path} predicts NaN or inf on {image}: give a checkpoint that has not diverged"
    assert not list((tmp_path / "out").glob("*.png"))


def test_existing_files_are_replaced_only_with_overwrite(glands_folder: Path, tmp_path: Path) -> None:
    """Masks that somebody drew, those of an earlier call, and tables; a call that is refused changes nothing."""
    model, part = save_model(tmp_path / "model"), tmp_path / "val"
    shutil.copytree(glands_folder / "val", part)
    (part / "mask").rename(part / "drawn")
    arguments = options(model, part / "image", part / "drawn")
    before = {path: path.read_bytes() for path in part.rglob("*.png")}
    for _ in range(2):  # a refused call is not one that was interrupted
        message = refused(predict.main, arguments)
        first = part / "drawn" / "0000.png"
        assert message == f"{first} exists: give another --out, or --overwrite to replace such files"
    assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001.tif").touch()  # predict removes a mask of this name when it writes 0001.png
    assert refused(predict.main, options(model, part / "image", tmp_path / "out")).startswith(
        f"{tmp_path / 'out' / '0001.tif'} exist"
    )
    predict.main([*arguments, "--overwrite"])
    assert (part / "drawn" / "0000.png").read_bytes() != before[part / "drawn" / "0000.png"]


@pytest.mark.parametrize("spelling", ["folder", "file", "link", "relative", "linked image", "linked mask"])
def test_the_masks_of_a_data_folder_are_never_replaced(
    glands_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    part, model = tmp_path / "val", save_model(tmp_path / "model")
    shutil.copytree(glands_folder / "val", part)
    (tmp_path / "link").symlink_to(part / "image")
    if spelling.startswith("linked "):
        linked = part / spelling.removeprefix("linked ")
        linked.rename(tmp_path / "moved")
        linked.symlink_to(tmp_path / "moved")
    monkeypatch.chdir(part / "image")
    images, masks = {
        "folder": (part / "image", part / "mask"),
        "file": (part / "image" / "0000.png", part / "mask"),
        "link": (tmp_path / "link", part / "mask"),
        "relative": (Path(), Path("../mask")),
    }.get(spelling, (part / "image", part / "mask"))
    message = refused(predict.main, [*options(model, images, masks), "--overwrite"])
    assert message == f"--out is {masks}, which has the masks of these images: give another folder"
    for mask in (part / "mask").iterdir():
        mask.unlink()  # now it may hold pseudo-labels
    predict.main(options(model, images, masks))
    assert (part / "mask" / "0000.png").is_file()


def test_out_is_no_file(glands_folder: Path, tmp_path: Path) -> None:
    message = refused(
        predict.main, options(save_model(tmp_path / "model"), glands_folder / "val" / "image", tmp_path / "mask.png")
    )
    assert message == f"--out is {tmp_path / 'mask.png'}, but it is a folder for files NAME.png: leave out .png"
    assert not (tmp_path / "mask.png").exists()


def test_images_behind_links_are_never_replaced(glands_folder: Path, tmp_path: Path) -> None:
    model, store, links = save_model(tmp_path / "model"), tmp_path / "store", tmp_path / "links"
    shutil.copytree(glands_folder / "val" / "image", store)
    for folder in (links, tmp_path / "out"):
        folder.mkdir()
    (links / "0000.png").symlink_to(store / "0000.png")
    (tmp_path / "out" / "0000.png").symlink_to(store / "0000.png")
    before = (store / "0000.png").read_bytes()
    for out in (store, tmp_path / "out"):
        message = refused(predict.main, options(model, links, out, "--overwrite"))
        assert message == f"{out / '0000.png'} is an input, {store / '0000.png'}: give another --out"
    assert (store / "0000.png").read_bytes() == before
    assert (tmp_path / "out" / "0000.png").is_symlink()


def test_scikit_image_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.png").touch()
    monkeypatch.setitem(sys.modules, "skimage", None)
    arguments = options(Path("none"), tmp_path / "image.png", tmp_path / "out")
    assert refused(predict.main, [*arguments, "--instances"]).endswith(
        "is not installed: run `pip install scikit-image`"
    )
    assert "none does not exist" in refused(predict.main, arguments)  # a mask does not need it


def test_names_that_are_not_utf8(glands_folder: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"l\xe9sion.png")
    image.write_bytes(next((glands_folder / "val" / "image").iterdir()).read_bytes())
    predict.main(options(save_model(tmp_path / "model"), image, tmp_path / "out", "--instances"))
    assert len(list((tmp_path / "out" / "instances").iterdir())) == 2
