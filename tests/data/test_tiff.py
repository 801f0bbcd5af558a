"""TIFF files by region: layouts, pyramids, resolution, damage, and what a region costs."""

from __future__ import annotations

import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import (
    COLORS,
    GRAYS,
    QUARTER_MICRON,
    RNG,
    TILES,
    agrees_with_crops,
    needs_pillow_13,
    overwrite,
    pyramid,
    regions,
    whole,
    write,
)
from PIL import Image

from semimoe_fast.data import tiff
from semimoe_fast.data.folders import read_image
from semimoe_fast.data.readers import Resampled, mpp_of, open_image
from semimoe_fast.errors import UserError

# -------------------------------------------------------------------------------------------------------------- layouts


PALETTE = RNG.integers(0, 2**16, (3, 256), np.uint16)
LAYOUTS = {
    "contiguous": {"tile": None},
    "strips": {"tile": None, "rowsperstrip": 7, "compression": "zlib"},
    "one compressed strip": {"tile": None, "rowsperstrip": 200, "compression": "zlib"},
    "tiles": {},
    "deflate": {"compression": "zlib", "predictor": True},
    "big-endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
    "OME": {"ome": True, "metadata": {"axes": "YXS"}},
}
GRAY_PREMULTIPLIED = "gray and associated alpha"
IMAGES = {
    "planes in tiles": (COLORS.transpose(2, 0, 1), {"planarconfig": "separate", "compression": "zlib"}),
    "planes in rows": (COLORS.transpose(2, 0, 1), {"planarconfig": "separate", "tile": None}),
    "gray": (GRAYS, {"photometric": "minisblack"}),
    "inverted gray": (GRAYS, {"photometric": "miniswhite"}),
    "gray and alpha": (COLORS[..., :2], {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [2]}),
    "palette": (GRAYS, {"photometric": "palette", "colormap": PALETTE}),
    "alpha": (np.dstack([COLORS, GRAYS]), {"extrasamples": ["unassalpha"]}),
    "associated alpha": (np.dstack([COLORS, GRAYS]), {"extrasamples": ["assocalpha"]}),
    "associated alpha and more": (np.dstack([COLORS, GRAYS, GRAYS]), {"extrasamples": ["assocalpha", "unspecified"]}),
    GRAY_PREMULTIPLIED: (
        np.dstack([COLORS[..., 0], np.maximum(COLORS[..., 1], 1)]),
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["assocalpha"]},
    ),
    **{f"orientation {turn}": (COLORS, {"extratags": [(274, "H", 1, turn, True)]}) for turn in range(2, 9)},
}


@pytest.mark.parametrize(
    "name",
    [*LAYOUTS, *(pytest.param(name, marks=[needs_pillow_13] * (name == GRAY_PREMULTIPLIED)) for name in IMAGES)],
)
def test_a_tiff_is_read_by_region_as_pillow_reads_it(tmp_path, name):
    pixels, options = IMAGES.get(name) or (COLORS, LAYOUTS[name])
    path = write(tmp_path / "image.tif", pixels, **options)
    with tiff.open_levels(path)[0] as reader:  # no other way than by region
        assert np.array_equal(whole(reader), read_image(path))
        assert agrees_with_crops(reader)


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "packbits", "zstd", "jpeg2000"])
def test_compressions_of_imagecodecs(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    path = write(tmp_path / "image.tif", compression=compression)
    with tiff.open_levels(path)[0] as reader:
        expected = tifffile.imread(path)
        assert np.array_equal(whole(reader), expected)
        assert agrees_with_crops(reader)


def test_without_imagecodecs_pillow_decodes_or_a_line_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "image.tif"
    Image.fromarray(COLORS).save(path, compression="tiff_lzw")

    class Missing(dict):
        def __missing__(self, key):
            raise KeyError(f"{key} requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", Missing())
    assert np.array_equal(whole(open_image(path)), COLORS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(
        UserError, match=r"image.tif has more than 10,000 pixels .* pip install imagecodecs\): save it as"
    ):
        open_image(path)


def test_more_than_8_bits_are_refused_in_the_same_words(tmp_path):
    path = write(tmp_path / "deep.tif", COLORS.astype(np.uint16))
    with pytest.raises(UserError, match=r"deep.tif has more than 8 bits per channel \(16 bits\): save it as 8-bit RGB"):
        open_image(path)


def test_threads_share_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "KEPT_BYTES", 20000)  # of 80,000: tiles come and go
    reader = open_image(write(tmp_path / "image.tif", compression="zlib"))
    wanted = regions(reader.size, 200)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda region: reader.read(*region), wanted))
    for pixels, (row, column, height, width) in zip(found, wanted, strict=True):
        assert np.array_equal(pixels, COLORS[row : row + height, column : column + width])
    assert reader.file.bytes == sum(tile.nbytes for tile in reader.file.decoded.values()) <= 20000


# ---------------------------------------------------------------------------------------------- pyramids and resolution


@pytest.mark.parametrize("subifds", [True, False])
def test_the_smallest_level_with_enough_resolution_is_read(tmp_path, subifds, capfd):
    path = pyramid(tmp_path / "image.tif", subifds=subifds)
    assert [level.size for level in tiff.open_levels(path)] == [(984, 1256), (492, 628), (246, 314)]
    for scale, level in ((0.6, 984), (0.5, 492), (0.26, 492), (0.25, 246), (0.1, 246), (2, 984)):
        with open_image(path, scale=scale) as reader:
            source = reader.source if isinstance(reader, Resampled) else reader
            assert source.size[0] == level
            assert reader.size == (round(984 * scale), round(1256 * scale))
            assert reader.full_size == (984, 1256)
            assert agrees_with_crops(reader)
    assert capfd.readouterr().err == ""  # levels are no further pages


def test_missing_levels_and_other_pages(tmp_path, capfd):
    path = pyramid(tmp_path / "levels.tif")
    overwrite(path, 0, "SubIFDs", (2**31, 2**31))  # beyond the end
    with open_image(path, scale=0.25) as reader:
        assert reader.source.size == (984, 1256)
    assert "levels.tif: its smaller copies cannot be read" in capfd.readouterr().err
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for pixels in (COLORS, COLORS, COLORS[:50]):
            file.write(pixels, **TILES)
    assert open_image(tmp_path / "pages.tif", scale=0.5).source.size == (123, 157)
    assert "pages.tif has 3 pages, and only the first is used" in capfd.readouterr().err


@pytest.mark.parametrize("description", ["two sections of one block", "Aperio Image Library v12.0.15"])
def test_further_pages_are_levels_only_if_the_file_says_so(tmp_path, capfd, description):
    """A page of half the size, without the flag of a reduced copy: of Aperio a level, of others another image."""
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as file:
        for pixels in (COLORS, COLORS[::-2, ::2]):
            file.write(pixels, **TILES, metadata=None, description=description)
    is_aperio = description.startswith("Aperio")
    with open_image(path, scale=0.5) as reader:
        source = reader.source if isinstance(reader, Resampled) else reader
        assert source.size == ((62, 79) if is_aperio else (123, 157))
    warned = "pages.tif has 2 pages, and only the first is used" in capfd.readouterr().err
    assert warned == (not is_aperio)


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (0, 0), "resolutionunit": "INCH"}, None),
        ({"resolution": (4e9, 4e9), "resolutionunit": "INCH"}, None),
        ({"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.2528}}, 0.2528),
        ({"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 252, "PhysicalSizeXUnit": "nm"}}, 0.252),
        ({"description": '<OME PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m"/>'}, 0.5),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micron"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": r"\u00B5m"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ({"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 252, "PhysicalSizeXUnit": "pixel"}}, None),
        ({"metadata": None, "description": "Aperio Image Library|AppMag = 40|MPP = 0.2520"}, 0.252),
        ({"metadata": None, "description": "Aperio Image Library|AppMag = 40|MPP = 1.2.3"}, None),
    ],
)
def test_resolution_of_a_tiff(tmp_path, options, mpp):
    path = write(tmp_path / "image.tif", **options)
    with open_image(path) as reader:
        assert reader.mpp == mpp_of(path) == (mpp and pytest.approx(mpp))


def test_long_descriptions_are_searched_once(tmp_path):
    """A search for the unit from each line on would take minutes."""
    path = write(tmp_path / "image.tif", metadata=None, description="ImageJ=\n" * 200_000)
    start = time.process_time()
    assert mpp_of(path) is None
    assert time.process_time() - start < 5


def test_resolution_of_a_tiff_that_pillow_decodes(tmp_path):
    """One bit per channel, which is not read by region."""
    description = "Aperio Image Library|AppMag = 40|MPP = 0.2520"
    path = write(tmp_path / "image.tif", GRAYS > 99, photometric="minisblack", metadata=None, description=description)
    assert open_image(path).mpp == mpp_of(path) == 0.252


# --------------------------------------------------------------------------------------------------------------- damage


def test_damage_in_one_tile_is_said_where_it_is_read(tmp_path):
    path = write(tmp_path / "image.tif", compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]  # row 1, column 1
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_image(path) as reader:
        assert np.array_equal(reader.read(0, 0, 32, 157), COLORS[:32])
        with pytest.raises(UserError, match=rf"image.tif is damaged, tile 5 at byte {offset} \(.*\): copy it again or"):
            reader.read(30, 47, 3, 3)


def test_a_file_that_is_cut_or_lost_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "image.tif")
    with open_image(path) as reader:
        reader.read(0, 0, 10, 10)
        os.truncate(path, 10000)
        with pytest.raises(
            UserError, match=r"image.tif is truncated \(4608 bytes at \d+ are missing\): copy it again or"
        ):
            whole(reader)
    with open_image(write(path)) as reader:
        path.unlink()  # an open file stays
        assert np.array_equal(reader.read(0, 0, 32, 48), COLORS[:32, :48])
        monkeypatch.setattr(os, "pread", lambda *_: os.read(-1, 1))  # but not on a network drive
        with pytest.raises(UserError, match=r"image.tif cannot be read at byte \d+ \(.*Bad file descriptor\): copy it"):
            whole(reader)


@pytest.mark.parametrize(
    ("tag", "value", "message"),
    [
        ("ImageLength", 0, "has wrong tags: 157 x 0 pixels"),
        ("ImageLength", 60000, "has wrong tags: 157 x 60000 pixels need 7500 tiles or strips, not 16"),
        ("TileWidth", 65520, "damaged|truncated|wrong tags"),
        ("TileByteCounts", None, "has wrong tags: tile 0 has 16777216 bytes"),
        ("Compression", 60000, "cannot be read as an image"),
        ("SamplesPerPixel", 1, "cannot be read as an image"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of Pillow
def test_wrong_tags(tmp_path, tag, value, message):
    path = write(tmp_path / "image.tif")
    overwrite(path, 0, tag, (2**24,) * 16 if value is None else value)
    with pytest.raises(UserError, match=f"image.tif.*({message})") as error:
        whole(open_image(path))
    assert "again" in str(error.value) or "replace" in str(error.value)


@pytest.mark.parametrize(
    ("tag", "count", "message"),
    [("ImageWidth", 1, r"157.0 x \d+ pixels"), ("TileOffsets", 16, "tiles or strips"), ("TileByteCounts", 16, "tiles")],
)
def test_tags_that_are_no_integers(tmp_path, tag, count, message):
    path = write(tmp_path / "image.tif")
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].tags[tag].offset
    data = bytearray(path.read_bytes())
    data[start + 2 : start + 8] = struct.pack("<HI", tifffile.DATATYPE.FLOAT, count)
    if count == 1:
        data[start + 8 : start + 12] = struct.pack("<f", 157.0)
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"image.tif has wrong tags: .*{message}"):
        open_image(path)


@pytest.mark.filterwarnings("ignore")  # of Pillow
@settings(max_examples=150, deadline=5000)
@given(data=st.data(), kind=st.sampled_from(["tiles", "deflate", "pyramid", "BigTIFF"]))
def test_any_damage_is_one_line_or_an_image(tmp_path_factory, data, kind):
    """Bytes of the tags are changed, and files are cut."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.tif"
    if kind == "pyramid":
        with tifffile.TiffWriter(path) as file:
            file.write(COLORS, **TILES, **QUARTER_MICRON, subifds=1)
            file.write(COLORS[::2, ::2], **TILES)
    else:
        write(path, **LAYOUTS[kind], **QUARTER_MICRON)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, 700), max_size=3)):
        content[place] = data.draw(st.sampled_from([0, 1, 2, 127, 128, 255]) | st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    try:
        with open_image(path, scale=data.draw(st.sampled_from([None, 0.5]))) as reader:
            height, width = (min(side, 200) for side in reader.size)
            assert reader.read(0, 0, height, width).shape == (height, width, 3)
    except UserError as error:
        message = str(error)
    else:
        message = f"{path} is an image"
    assert str(path) in message
    assert len(message.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- what a region costs


def test_a_region_of_a_large_image_decodes_its_tiles_alone(tmp_path, monkeypatch):
    """20,000 x 20,000 pixels, 1.2 GB. All tiles but one are left out of the file, as TIFF allows."""
    tile = RNG.integers(0, 256, (256, 256, 3), np.uint8)
    path = tmp_path / "large.tif"
    count = -(-20000 // 256)
    tiles = (zlib.compress(tile) if index == 40 * count + 40 else b"" for index in range(count**2))
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib", "bigtiff": True}
    tifffile.imwrite(path, tiles, shape=(20000, 20000, 3), dtype=np.uint8, **options)
    assert path.stat().st_size < 2**20
    calls = []
    decode = tiff.PageReader.decode
    monkeypatch.setattr(tiff.PageReader, "decode", lambda self, y, x: calls.append((y, x)) or decode(self, y, x))
    with open_image(path) as reader:
        assert reader.size == (20000, 20000)
        pixels = reader.read(40 * 256 - 100, 40 * 256 - 100, 300, 300)
        assert np.array_equal(pixels[100:, 100:], tile[:200, :200])
        assert not pixels[:100].any()
        assert sorted(calls) == [(39, 39), (39, 40), (40, 39), (40, 40)]
        reader.read(40 * 256, 40 * 256, 256, 256)
        assert len(calls) == 4  # tiles are kept


def test_resampling_touches_only_the_tiles_of_its_region(tmp_path):
    with open_image(pyramid(tmp_path / "image.tif"), scale=0.2) as reader:
        reader.read(100, 100, 10, 10)
        assert {key[1:] for key in reader.source.file.decoded} == {(3, 2), (4, 2)}  # rows 124 to 138 of level 2


def test_the_least_recently_used_tile_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "KEPT_BYTES", 2 * 32 * 48 * 3)
    with open_image(write(tmp_path / "image.tif")) as reader:
        for column in (0, 48, 0, 96):
            reader.read(0, column, 1, 1)
        assert [key[1:] for key in reader.file.decoded] == [(0, 0), (0, 2)]


def test_a_contiguous_image_is_read_by_rows(tmp_path, monkeypatch):
    path = write(tmp_path / "image.tif", tile=None, rowsperstrip=123)
    monkeypatch.setattr(tiff, "ROW_BYTES", 157 * 3 * 10)
    with open_image(path) as reader:
        assert np.array_equal(reader.read(35, 20, 10, 10), COLORS[35:45, 20:30])
        assert reader.file.bytes == 157 * 3 * 20


def test_big_endian_bigtiff(tmp_path):
    with open_image(write(tmp_path / "image.tif", bigtiff=True, byteorder=">")) as reader:
        assert isinstance(reader, tiff.PageReader)
        assert reader.mpp is None


def test_resolution_without_a_unit(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "image.tif", tiffinfo={282: 50800.0, 283: 50800.0})
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        assert "ResolutionUnit" not in file.pages[0].tags
    assert mpp_of(tmp_path / "image.tif") == pytest.approx(0.5)


def test_resolution_of_0(tmp_path):
    path = write(tmp_path / "image.tif", resolution=((0, 1), (0, 1)))
    with tiff.open_levels(path)[0] as reader:
        assert reader.mpp is None


def test_levels_in_any_order(tmp_path):
    full = COLORS.repeat(8, 0).repeat(8, 1)
    with tifffile.TiffWriter(tmp_path / "image.tif") as file:
        file.write(full, photometric="rgb", tile=(256, 256), subifds=2)
        for step in (4, 2):
            file.write(full[::step, ::step], photometric="rgb", tile=(256, 256), subfiletype=1)
    assert [level.size for level in tiff.open_levels(tmp_path / "image.tif")] == [(984, 1256), (246, 314)]
