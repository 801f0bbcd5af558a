"""`python -m semimoe_fast.predict` in tiles: scales, streamed outputs, what it refuses."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from predictions import call, failing, fields_of, save_image, save_model
from refusals import refused

from semimoe_fast import predict
from semimoe_fast.data import tiff
from semimoe_fast.data.folders import read_instances, read_mask
from semimoe_fast.errors import UserError

pytest.importorskip("tyro", reason="commands read their options with tyro")


def test_fields_are_those_of_the_library(tmp_path: Path) -> None:
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "image.tif", 100, 150)
    out = call(model, image, tmp_path / "out", "--probability", "--fields")
    probability, sdf, boundary = fields_of(model, image)
    assert np.array_equal(read_mask(out / "image.png"), (probability > 0.5).numpy())
    for name, field in (("probability", probability), ("sdf", sdf), ("boundary", boundary)):
        assert np.array_equal(tifffile.imread(out / name / "image.ome.tif"), field.half().numpy())
    assert sorted(path.name for path in out.iterdir()) == ["boundary", "image.png", "probability", "sdf"]
    turned = call(model, image, tmp_path / "tta", "--tta", "--probability")
    assert not np.array_equal(tifffile.imread(turned / "probability" / "image.ome.tif"), probability.half().numpy())


def test_scale_decides_and_the_mask_has_the_size_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    micron = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
    image = save_image(tmp_path / "image.tif", 130, 150, **micron)
    squares = save_model(tmp_path / "squares", sampling="resize", scale=0.5)
    crops, known = save_model(tmp_path / "crops"), save_model(tmp_path / "known", mpp=2.0)
    half = fields_of(crops, image, 0.5)[0]
    assert torch.equal(half, fields_of(crops, tifffile.imread(image), 0.5)[0])  # pixels in memory
    for model, options in ((squares, ["--scale", "0.5"]), (crops, ["--mpp", "2"]), (known, [])):
        mask = read_mask(call(model, image, tmp_path / "out", *options) / "image.png")
        assert np.array_equal(mask, (half > 0.5).numpy())
        assert capsys.readouterr().err.count(f"{image} has 1 microns a pixel and is read at 2") == (model != squares)
    for model, scale in ((crops, 1.0), (squares, None)):  # its own scale; squashed
        mask = read_mask(call(model, image, tmp_path / "out", tiles=model != squares) / "image.png")
        assert np.array_equal(mask, (fields_of(model, image, scale)[0] > 0.5).numpy())
    assert refused(call, crops, save_image(tmp_path / "plain.tif", 70, 70), tmp_path / "out", "--mpp", "1").startswith(
        f"{tmp_path / 'plain.tif'} does not say how large its pixels are"
    )


@pytest.mark.parametrize(
    ("size", "scale", "warned"),
    [
        ((32, 32), None, 0),
        ((60, 60), None, 0),
        ((32, 52), None, 1),  # long
        ((70, 70), None, 1),  # large
        ((70, 90), 0.4, 0),
        ((70, 130), 0.4, 1),
        ((40, 70), 0.4, 1),  # 40 * 0.4 pixels become 32
    ],
)
def test_squashed_images_far_from_the_training_images_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, size: tuple[int, int], scale: float | None, warned: int
) -> None:
    for name in ("a.tif", "b.tif"):
        save_image(tmp_path / "images" / name, *size)
    model = save_model(tmp_path / "model", sampling="resize", scale=scale)
    call(model, tmp_path / "images", tmp_path / "out", tiles=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 2 * warned
    assert (
        lines[1:]
        == ["warning: images that are squashed, although they are far from the training images: 1 more"] * warned
    )
    for line in lines[:1]:
        assert f"{tmp_path}/images/a.tif is {size[1]} x {size[0]} pixels and resized to the 32 x 32" in line
        assert ("give --scale 0.4, " if scale else "give --scale, ") in line


def test_large_masks_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "images" / "a.tif", 100, 150)
    out = call(model, image, tmp_path / "out")
    ordinary = read_mask(out / "a.png")
    monkeypatch.setattr(predict, "MOST_PIXELS", 149)
    call(model, image, out)
    assert [path.name for path in out.iterdir()] == ["a.tif"]  # of one stem, as evaluate needs it
    assert np.array_equal(read_mask(out / "a.tif"), ordinary)
    assert tifffile.TiffFile(out / "a.tif").pages[0].is_tiled
    call(model, image, out, "--overlay")
    assert (out / "overlay" / "a.png").exists()
    monkeypatch.setattr(predict, "MOST_WITH_OVERLAY", 14_999)
    assert refused(call, model, image, out, "--overlay") == (
        f"{image} is 150 x 100 pixels, and --overlay takes images of up to 0.015 megapixels: leave it out, or cut the "
        "image"
    )
    monkeypatch.setattr(predict, "is_slide", lambda path: True)  # skips its background
    tifffile.imwrite(image, np.full((100, 150, 3), 240, np.uint8))
    for option, level in (("auto", 0), ("on", 0), ("off", 1)):
        call(model, image, out, "--skip-background", option, "--threshold", "0", "--tile-size", "64")
        assert read_mask(out / "a.tif").max() == level


def test_instances_of_streamed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same objects as in memory; label image and polygons agree with each other and replace those of before."""
    pytest.importorskip("skimage", reason="instances need scikit-image")
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "images" / "a.tif", 200, 150)
    out = tmp_path / "out"
    options = ["--instances", "--least-area", "4", "--tile-size", "64"]
    call(model, image, out, *options, "--overlay")
    labels = read_instances(out / "instances" / "a.png")
    features = json.loads((out / "instances" / "a.geojson").read_text())["features"]
    overlay = (out / "overlay" / "a.png").read_bytes()
    assert len(features) == labels.max() > 5
    for module, name, value in ((predict, "MOST_PIXELS", 199), (predict, "MOST_IN_MEMORY", 29_999)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            call(model, image, out, *options, "--overlay")
        assert sorted(path.name for path in (out / "instances").iterdir()) == ["a.geojson", "a.tif"]
        found = tifffile.imread(out / "instances" / "a.tif")
        streamed = json.loads((out / "instances" / "a.geojson").read_text())["features"]
        assert found.dtype == np.uint32
        assert len(np.unique(np.stack([found, labels]).reshape(2, -1), axis=1).T) == labels.max() + 1
        for feature in streamed:  # its number is that of its pixels
            (label,) = np.unique(labels[found == int(feature["properties"]["name"])])
            feature["properties"]["name"] = str(label)
        key = operator.itemgetter("id")
        assert sorted(streamed, key=key) == sorted(features, key=key)
        assert (out / "overlay" / "a.png").read_bytes() == overlay
    call(model, image, out, *options)
    assert sorted(path.name for path in (out / "instances").iterdir()) == ["a.geojson", "a.png"]


def test_slides_and_large_images_are_not_squashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from semimoe_fast.inference import image as module

    model, image = save_model(tmp_path / "m", sampling="resize"), save_image(tmp_path / "a.tif", 70, 90)
    monkeypatch.setattr(module, "MOST_PIXELS", 80)
    message = refused(call, model, image, tmp_path / "out", tiles=False)
    assert message.startswith(f"{image} is 90 x 70 pixels, too large to be squashed")
    assert "--scale" in message
    call(model, image, tmp_path / "out", "--scale", "1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--scale 0", "--scale is 0.0: give a number from 0.01 to 16"),
        ("--scale 1e-9", "--scale is 1e-09: give a number from 0.01 to 16"),
        ("--mpp 1e9", "--mpp is 1000000000.0: give a number from 0.02 to 20"),
        ("--mpp nan", "--mpp is nan: give a number from 0.02 to 20"),
        ("--seed-level 0.5", "--seed-level is 0.5: it needs --instances; add that, or leave it out"),
        ("--least-area 9", "--least-area is 9: it needs --instances; add that, or leave it out"),
        ("--mpp 1 --scale 1", "--scale and --mpp: both given; give one of them"),
        ("--tile-size 100", "--tile-size is 100: give a positive multiple of 16"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, given: str, message: str) -> None:
    image = save_image(tmp_path / "a.tif", 20, 20)
    assert refused(call, tmp_path / "none", image, tmp_path / "out", *given.split()) == message


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    image, crops = save_image(tmp_path / "a.tif", 70, 90), save_model(tmp_path / "crops", ("mask",))
    assert refused(call, crops, image, tmp_path / "out", "--fields") == (
        f"--fields: {crops} has no expert for sdf or boundary; leave it out"
    )
    squares = save_model(tmp_path / "squares", sampling="resize")
    assert refused(call, squares, image, tmp_path / "out") == (
        f"--tile-size is 64, but images are squashed to the 32 x 32 of {squares}: add --scale or --mpp to predict in "
        "tiles, or leave it out"
    )
    assert not (tmp_path / "out").exists()


def test_a_file_is_opened_once_and_its_scale_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save_image(tmp_path / "a.tif", 70, 90, resolution=(1e4, 1e4), resolutionunit="CENTIMETER")
    opened: list[Path] = []
    open_levels = tiff.open_levels
    monkeypatch.setattr(tiff, "open_levels", lambda path: opened.append(path) or open_levels(path))
    call(save_model(tmp_path / "known", mpp=2.0), image, tmp_path / "out")
    assert opened == [image]
    assert refused(call, save_model(tmp_path / "odd", mpp=1e-6), image, tmp_path / "out") == (
        f"{image} has 1 microns a pixel and would be read at 1e-06, 1e+06 pixels per pixel of the file: choose "
        "microns at which they are 0.01 to 16, or correct its resolution"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_squashed_images_keep_their_resolution(tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.tif", 40, 60, resolution=(2e4, 2e4), resolutionunit="CENTIMETER")
    model = save_model(tmp_path / "model", sampling="resize")
    out = call(model, image, tmp_path / "out", "--probability", tiles=False)
    with tifffile.TiffFile(out / "probability" / "a.ome.tif") as file:
        assert 'PhysicalSizeX="0.5" PhysicalSizeY="0.5"' in file.ome_metadata
        assert file.pages[0].shape == (40, 60)


def test_names_of_ome_tiffs(tmp_path: Path) -> None:
    """Masks have the stem of the image, as evaluate pairs them."""
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "images" / "x.ome.tif", 40, 50)
    out = call(model, image.parent, tmp_path / "out", "--probability")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["probability/x.ome.tif", "x.ome.png"]
    other = save_image(tmp_path / "images" / "x.tif", 40, 50)
    assert refused(call, model, image.parent, tmp_path / "new", "--probability") == (
        f"{image} and {other.name} would both be written to {tmp_path / 'new' / 'probability' / 'x.ome.tif'}: remove "
        "or rename one"
    )
    call(model, image.parent, tmp_path / "out")


def test_progress_counts_images(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged image counts, and the total never changes."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for name, size in (("a.tif", 90), ("b.tif", 200), ("c.tif", 70)):
        save_image(tmp_path / "images" / name, size, size)
    damaged = tmp_path / "images" / "b.tif"
    damaged.write_bytes(damaged.read_bytes()[:-20_000])
    error = failing(capsys, save_model(tmp_path / "model"), tmp_path / "images", tmp_path / "out")
    shown = re.findall(r"predict (\d)/(\d): +(\d+)%", error)
    assert {total for _, total, _ in shown} == {"3"}
    percentages = [int(percentage) for *_, percentage in shown]
    assert percentages == sorted(percentages)
    assert shown[-1] == ("3", "3", "100")


def test_paths_may_be_text_and_pixels_have_no_path(tmp_path: Path) -> None:
    model, image = save_model(tmp_path / "model", sampling="resize"), save_image(tmp_path / "a.tif", 40, 50)
    for one, other in zip(fields_of(model, str(image)), fields_of(model, image), strict=True):
        assert torch.equal(one, other)
    pixels = np.zeros((17_000, 4, 3), np.uint8)
    with pytest.raises(UserError, match=r"^the image is 4 x 17000 pixels, too large to be squashed"):
        fields_of(model, pixels)
