"""Image files for tests of readers, and regions of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
import tifffile

from semimoe_fast.data.readers import Reader

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (123, 157, 3), np.uint8)
GRAYS = COLORS[..., 0]
TILES = {"photometric": "rgb", "tile": (32, 48)}
QUARTER_MICRON = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}

needs_pillow_13 = pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow 12 cannot read it")


def write(path: Path, pixels: np.ndarray = COLORS, **options) -> Path:
    tifffile.imwrite(path, pixels, **TILES | options)
    return path


def pyramid(path: Path, levels: int = 3, subifds: bool = True, **options) -> Path:
    """COLORS in blocks of 8 x 8 pixels, and its copies at half the size, a quarter and so on."""
    full = COLORS.repeat(8, 0).repeat(8, 1)
    with tifffile.TiffWriter(path) as file:
        file.write(full, **TILES, **QUARTER_MICRON, subifds=levels - 1 if subifds else 0, metadata=None, **options)
        for level in range(1, levels):
            copy = full[:: 2**level, :: 2**level]
            file.write(copy, **TILES, subfiletype=1, metadata=None, **options)
    return path


def overwrite(path: Path, page: int, tag: str, value: object, dtype: str = "I") -> None:
    """Replace a tag of a page of a TIFF; an integer may have 32 bits."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[page].tags[tag].overwrite(value, dtype=dtype)


def whole(reader: Reader) -> np.ndarray:
    return reader.read(0, 0, *reader.size)


def regions(size: tuple[int, int], count: int = 20) -> list[tuple[int, int, int, int]]:
    """Random regions, and the last pixel."""
    found = [(size[0] - 1, size[1] - 1, 1, 1)]
    for _ in range(count):
        row, column = RNG.integers(0, size)
        found.append((row, column, RNG.integers(1, size[0] - row + 1), RNG.integers(1, size[1] - column + 1)))
    return found


def agrees_with_crops(reader: Reader) -> bool:
    pixels = whole(reader)
    return all(
        np.array_equal(reader.read(row, column, height, width), pixels[row : row + height, column : column + width])
        for row, column, height, width in regions(reader.size)
    )
