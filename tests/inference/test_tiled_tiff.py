"""Files that are written by rows hold the same pixels for every reader."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image

from semimoe_fast.inference.outputs import write_labels
from semimoe_fast.inference.tiled_tiff import TiledTiff


@pytest.mark.parametrize("size", [(1, 1), (512, 512), (513, 1100), (1030, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_files_are_read_by_tifffile_and_pillow(tmp_path: Path, size: tuple[int, int], dtype: str) -> None:
    pixels = (np.random.default_rng(0).random(size) * 255).astype(dtype)
    path, channel = tmp_path / "a.tif", None if dtype == "uint8" else "é & <x>"
    with TiledTiff(path, size, dtype, 0.25, channel) as file:
        for start in range(0, size[0], 300):
            file.write(pixels[start : start + 300])
    with tifffile.TiffFile(path) as file:
        assert (file.is_bigtiff, file.pages[0].is_tiled, file.is_ome) == (True, True, channel is not None)
        assert file.pages[0].resolution == (40_000, 40_000)  # pixels per centimeter
        found = file.asarray()
        assert found.dtype == dtype
        assert np.array_equal(found, pixels)
        if channel:
            (plane,) = ElementTree.fromstring(file.ome_metadata).findall(".//{*}Pixels")
            assert plane.attrib.items() >= {"Type": "float", "PhysicalSizeX": "0.25", "SizeY": str(size[0])}.items()
            assert plane.find("{*}Channel").get("Name") == channel
    if dtype == "uint8":
        with Image.open(path) as image:
            assert np.array_equal(np.array(image), pixels)


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="512 rows of 600 are written"),
        TiledTiff(tmp_path / "a", (600, 9), "uint8") as f,
    ):
        f.write(np.zeros((520, 9), np.uint8))


def test_labels_in_another_format_replace_those_of_an_earlier_call(tmp_path):
    labels = np.arange(70_000, dtype=np.int32).reshape(200, 350)
    for count, suffix in ((65_535, ".png"), (65_536, ".tif"), (65_535, ".png")):
        write_labels(tmp_path / "a.png", np.minimum(labels, count), mpp=0.5)
        assert [path.suffix for path in tmp_path.iterdir()] == [suffix]
