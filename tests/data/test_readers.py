"""Readers of images by region: a region is the crop of the whole at any scale, and damage is said in a line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import COLORS, GRAYS, agrees_with_crops, needs_pillow_13, overwrite, pyramid, whole, write
from PIL import Image
from torch.nn import functional

from semimoe_fast.data import readers, resampling, tiff
from semimoe_fast.data.folders import read_image, resize_image
from semimoe_fast.data.readers import ArrayReader, Resampled, mpp_of, open_image
from semimoe_fast.errors import UserError

# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".tif", mode) for mode in ("1", "L", "P", "RGBA", "CMYK", "LAB")]
    + [pytest.param(".tif", "YCbCr", marks=needs_pillow_13)]
    + [(".png", mode) for mode in ("1", "LA", "P", "RGBA")]
    + [(".jpg", "L"), (".jpg", "CMYK"), (".bmp", "RGB")],
)
def test_what_pillow_writes_is_read_as_read_image_reads_it(tmp_path, suffix, mode):
    path = tmp_path / f"image{suffix}"
    image = Image.fromarray(COLORS)
    image = Image.frombytes("LAB", image.size, image.tobytes()) if mode == "LAB" else image.convert(mode)
    image.save(path)
    with open_image(path) as reader:
        assert reader.path == path
        assert np.array_equal(whole(reader), read_image(path))
        assert agrees_with_crops(reader)


def test_pixels_in_memory():
    reader = ArrayReader(COLORS)
    assert (reader.size, reader.full_size, reader.path, reader.mpp) == ((123, 157), (123, 157), None, None)
    assert agrees_with_crops(reader)
    for region in ((-1, 0, 5, 5), (0, 0, 124, 5), (0, 153, 5, 5), (3, 3, 0, 5)):
        with pytest.raises(ValueError, match="are no region of an image of 123 x 157"):
            reader.read(*region)
    with pytest.raises(ValueError, match="not uint8"):
        ArrayReader(GRAYS)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "9.png")
    (tmp_path / "folder.tif").mkdir()
    for name in ("9.png", "folder.tif", "missing.svs"):
        with pytest.raises(UserError, match=f"{name}: no such image file; give a regular file"):
            open_image(tmp_path / name)


def test_images_that_must_be_decoded_whole_have_a_limit(tmp_path, monkeypatch):
    Image.fromarray(COLORS).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(UserError, match=r"image.png has more than 10,000 pixels and cannot be read by region: save it"):
        open_image(tmp_path / "image.png")
    assert np.array_equal(whole(open_image(write(tmp_path / "image.tif"))), COLORS)


@pytest.mark.parametrize(("dpi", "mpp"), [(50800, 0.5), (96, None), (0, None)])
def test_resolution_of_other_formats(tmp_path, dpi, mpp):
    for suffix in (".png", ".jpg"):
        Image.fromarray(COLORS).save(tmp_path / f"image{suffix}", dpi=(dpi, dpi))
        with open_image(tmp_path / f"image{suffix}") as reader:
            assert reader.mpp == mpp_of(reader.path) == (mpp and pytest.approx(mpp, rel=1e-3))


# ----------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("size", [(61, 78), (123, 100), (5, 3), (200, 301), (1, 1)])
def test_pieces_of_a_resampled_image_equal_the_whole_bit_for_bit(size, monkeypatch):
    reader = Resampled(ArrayReader(COLORS), size)
    assert agrees_with_crops(reader)
    pixels = whole(reader)
    monkeypatch.setattr(readers, "BAND_BYTES", 1)  # row by row
    assert np.array_equal(whole(reader), pixels)


@pytest.mark.parametrize("size", [(61, 78), (123, 100), (5, 3), (200, 301)])
def test_resampling_is_that_of_pillow_and_torch_to_a_gray_value(size):
    pixels = whole(Resampled(ArrayReader(COLORS), size)).astype(int)
    by_pillow = np.asarray(Image.fromarray(COLORS).resize(size[::-1], Image.Resampling.BILINEAR))
    assert abs(pixels - by_pillow).max() <= 1  # Pillow rounds weights, and between the axes
    stack = torch.from_numpy(COLORS).permute(2, 0, 1)[None].double()
    exact = functional.interpolate(stack, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(pixels - exact).max() <= 0.5 + 1e-3  # rounding to uint8, after sums in float32


def test_whole_images_are_resized_alike():
    resized = resize_image(COLORS, 64, antialias=True)
    assert resized.shape == (3, 64, 64)
    read = whole(Resampled(ArrayReader(COLORS), (64, 64))).transpose(2, 0, 1).astype(int)
    assert abs(resized.numpy() - read).max() <= 1
    assert torch.equal(resize_image(torch.from_numpy(COLORS), 64, antialias=True), resized)
    assert not torch.equal(resize_image(COLORS, 64), resized)
    larger = resize_image(COLORS, 300, antialias=True).int() - resize_image(COLORS, 300).int()
    assert larger.abs().max() <= 1  # enlarging is bilinear both ways


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_weights_of_a_constant_image_add_up(source, target):
    inputs, matrix = resampling.weights(source, target, 0, target)
    assert 0 <= inputs.start < inputs.stop <= source
    assert matrix.shape == (target, inputs.stop - inputs.start)
    assert matrix.min() >= 0
    assert abs(matrix.sum(1) - 1).max() < 1e-5


def test_a_scale_rounds_the_sides():
    for scale, size in ((None, (123, 157)), (1, (123, 157)), (0.5, (62, 78)), (1.5, (184, 236)), (1e-6, (1, 1))):
        reader = readers._at_scale([ArrayReader(COLORS)], scale, None)
        assert (reader.size, reader.full_size, reader.note) == (size, (123, 157), None)


def test_a_resolution_is_resampled_and_said(tmp_path):
    path = pyramid(tmp_path / "image.tif")
    for mpp, size, found in ((0.25, 984, 0.25), (0.252, 984, 0.25), (0.5, 492, 0.5), (0.506, 492, 0.5), (1, 246, 1)):
        with open_image(path, mpp=mpp) as reader:
            assert reader.size[0] == size
            assert reader.mpp == pytest.approx(found)
            assert (reader.note is None) == (found == 0.25)
    with open_image(path, mpp=0.4) as reader:
        assert reader.size == (615, 785)
        assert reader.mpp == pytest.approx(0.4, rel=1e-3)
        assert reader.note == f"{path} has 0.25 microns a pixel and is read at 0.4"
    Image.fromarray(COLORS).save(tmp_path / "image.png", dpi=(72, 72))
    with pytest.raises(UserError, match=r"image.png does not say how large its pixels are: .* or give a scale"):
        open_image(tmp_path / "image.png", mpp=0.5)
    for options in ({"scale": 1, "mpp": 1}, {"scale": 0}, {"mpp": float("nan")}):
        with pytest.raises(ValueError, match=r"not both|positive"):
            open_image(path, **options)


# --------------------------------------------------------------------------------------------------------------- slides


def slide(path: Path) -> Path:
    """A tiled TIFF in the words of an Aperio slide, a level at a quarter of the size, and a thumbnail."""
    full = COLORS.repeat(8, 0).repeat(8, 1)
    options = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    options["description"] = "Aperio Image Library v12.0.15\r\n1256x984 (256x256) JPEG/RGB|AppMag = 40|MPP = 0.2500"
    with tifffile.TiffWriter(path) as file:
        file.write(full, tile=(256, 256), **options)
        file.write(full[::8, ::8], rowsperstrip=16, **options)
        file.write(full[::4, ::4], tile=(256, 256), **options)
    return path


def test_slides_are_read_through_openslide(tmp_path):
    pytest.importorskip("openslide")
    pytest.importorskip("imagecodecs")
    path = slide(tmp_path / "slide.svs")
    with open_image(path) as reader:
        assert type(reader).__name__ == "SlideReader"
        assert (reader.size, reader.mpp) == ((984, 1256), 0.25)
        assert agrees_with_crops(reader)
        assert np.array_equal(whole(reader), whole(tiff.open_levels(path)[0]))
    with open_image(path, mpp=1) as reader:
        assert reader.size == (246, 314)
        assert reader.note == f"{path} has 0.25 microns a pixel and is read at 1"
    content = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[5]
    path.write_bytes(content[:offset] + bytes(1000) + content[offset + 1000 :])
    with open_image(path) as reader, pytest.raises(UserError, match=r"slide.svs is damaged \(.*\): copy it again"):
        whole(reader)
    overwrite(slide(path), 0, "TileWidth", 2**24 + 256)
    with pytest.raises(UserError, match=r"slide.svs cannot be read as a slide \(tiles of 16777472 x 256 pixels\)"):
        open_image(path)
    path.write_bytes(content[:3000])
    with pytest.raises(UserError, match=r"slide.svs cannot be read as a slide \(.*\): copy it again"):
        open_image(path)


def test_slides_without_openslide(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "slide.ndpi").write_bytes(b"II*\0")
    with pytest.raises(UserError, match=r"slides need OpenSlide \(.*\): pip install openslide-python openslide-bin"):
        open_image(tmp_path / "slide.ndpi")


def test_a_level_has_enough_resolution_on_both_axes():
    full, half = (ArrayReader(np.zeros((h, w, 3), np.uint8)) for h, w in ((5, 1000), (2, 500)))
    assert readers._at_scale([full, half], 0.5, None).size == (2, 500)
    reader = readers._at_scale([full, half], 0.6, None)
    assert reader.source is full
    reader = readers._at_scale([full, ArrayReader(np.zeros((3, 400, 3), np.uint8))], 0.5, None)
    assert reader.source is full


def test_dpi_of_x(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png", dpi=(50800, 25400))
    assert mpp_of(tmp_path / "a.png") == pytest.approx(0.5, rel=1e-3)


def test_a_refused_scale_closes_the_file(tmp_path):
    path = write(tmp_path / "image.tif")
    with pytest.raises(UserError, match="does not say how large its pixels are"):
        open_image(path, mpp=0.5)
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert str(path) not in opened
