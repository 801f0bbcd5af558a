"""Mask files that do not say for sure which pixels are foreground are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from refusals import refused

from semimoe_fast.data.components import scattered
from semimoe_fast.data.folders import read_image, read_instances, read_labels
from semimoe_fast.errors import UserError

MASK = np.zeros((40, 60), np.uint8)  # of two glands
MASK[5:15, 10:40] = MASK[20:35, 3:20] = 1
BLACK, WHITE, RED = [0, 0, 0], [255, 255, 255], [200, 0, 0]


def palette(indices: np.ndarray, *colors: list[int]) -> Image.Image:
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette(np.ravel(colors).tolist())
    return image


def gray(mask: np.ndarray = MASK) -> Image.Image:
    return Image.fromarray(255 * mask)


def with_alpha(values: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([values, values, values, alpha]))


def planes(path: Path, dtype: type) -> None:
    stacked = np.repeat(MASK[None].astype(dtype) * 200, 3, 0)
    tifffile.imwrite(path, stacked, photometric="rgb", planarconfig="separate")


def deep_ppm(path: Path, mask: np.ndarray) -> None:
    height, width = mask.shape
    path.write_bytes(b"P6 %d %d 65535\n" % (width, height) + np.repeat(mask[..., None], 3, -1).astype(">u2").tobytes())


def plain(kind: str, *largest: int) -> str:
    """The text of a file of Netpbm."""
    return " ".join(map(str, (kind, *MASK.shape[::-1], *largest, *MASK.ravel())))


ZERO_IS_WHITE = "shows 0 as white, so its glands may be 0 or not: save it as a PNG of one channel"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "1-bit.tif": (lambda path: tifffile.imwrite(path, MASK > 0, photometric="miniswhite"), ZERO_IS_WHITE),
    "8-bit.tif": (lambda path: tifffile.imwrite(path, MASK, photometric="miniswhite"), ZERO_IS_WHITE),
    "16-bit.tif": (lambda path: tifffile.imwrite(path, MASK.astype("u2"), photometric="miniswhite"), ZERO_IS_WHITE),
    "inverted.png": (palette(1 - MASK, WHITE, BLACK).save, ZERO_IS_WHITE),
    "inverted.tif": (palette(1 - MASK, WHITE, BLACK).save, ZERO_IS_WHITE),
    "inverted.bmp": (palette(1 - MASK, WHITE, BLACK).save, ZERO_IS_WHITE),
    "all.png": (palette(0 * MASK, WHITE, BLACK).save, ZERO_IS_WHITE),
    "palette.gif": (palette(1 - MASK, WHITE, BLACK).save, "is a GIF, and programs that write GIF renumber the values"),
    "palette.bmp": (palette(MASK, BLACK, WHITE).save, "a BMP of 8 bits that Pillow misreads"),
    "gray.jpg": (gray().save, "is compressed as JPEG, which can add non-zero values around each gland: save it as a"),
    "jpeg.tif": (lambda path: gray().save(path, compression="jpeg"), "is compressed as JPEG, which"),
    "lossy.jp2": (lambda path: gray().save(path, irreversible=True), "is compressed as JPEG 2000, which"),
    "lossy.webp": (lambda path: gray().save(path), "is compressed as WebP, which"),
    "black.png": (with_alpha(0 * MASK, 255 * MASK).save, "alpha channel that disagrees with its values"),
    "white.png": (with_alpha(0 * MASK + 255, 255 * MASK).save, "alpha channel that disagrees with its values"),
    "planes.tif": (lambda path: planes(path, np.uint16), "is a color image"),
    "plain.pbm": (lambda path: path.write_text(plain("P1")), f"is a PBM, which {ZERO_IS_WHITE}"),
    "packed.pbm": (Image.fromarray(MASK == 0).save, "is a PBM, which shows 0 as white"),
    "16-bit.ppm": (lambda path: deep_ppm(path, MASK), "is a color image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unclear_mask_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    write(tmp_path / name)
    line = refused(read_labels, tmp_path / name)
    assert line.startswith(f"{tmp_path / name} ")
    assert message in line


ACCEPTED: dict[str, Callable[[Path], object]] = {
    "1-bit.tif": lambda path: tifffile.imwrite(path, MASK > 0, photometric="minisblack"),
    "1-bit.png": Image.fromarray(MASK > 0).save,
    "plain.pgm": lambda path: path.write_text(plain("P2", 9)),
    "1-bit.bmp": Image.fromarray(MASK > 0).save,
    "two.png": palette(MASK, BLACK, WHITE).save,
    "class.png": palette(MASK, WHITE, RED).save,  # as QuPath exports labels
    "empty class.png": palette(0 * MASK, WHITE, RED).save,
    "transparent.png": with_alpha(255 * MASK, 255 * MASK).save,
    "opaque.png": with_alpha(255 * MASK, 0 * MASK + 255).save,
    "planes.tif": lambda path: planes(path, np.uint8),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_clear_mask_is_read_as_it_is_stored(tmp_path: Path, name: str) -> None:
    ACCEPTED[name](tmp_path / name)
    np.testing.assert_array_equal(read_labels(tmp_path / name) != 0, MASK * ("empty" not in name))


@pytest.mark.parametrize("name", ["planes.tif", "16-bit.ppm"])
def test_16_bits_are_no_8_bit_image(tmp_path: Path, name: str) -> None:
    """Pillow reads such a file as 8-bit RGB without an error."""
    REFUSED[name][0](tmp_path / name)
    with pytest.raises(UserError, match="has more than 8 bits per channel"):
        read_image(tmp_path / name)


def test_negative_values_of_8_bits_are_no_ids(tmp_path: Path) -> None:
    """Pillow reads them as unsigned."""
    ids = np.array([[1, 0, 2]], np.int8)
    tifffile.imwrite(tmp_path / "a.tif", ids)
    np.testing.assert_array_equal(read_instances(tmp_path / "a.tif"), ids)
    tifffile.imwrite(tmp_path / "a.tif", ids - 2)
    with pytest.raises(UserError, match="has the id -2"):
        read_instances(tmp_path / "a.tif")


def test_palette_of_white_alone(tmp_path):
    palette(np.zeros((4, 5), np.uint8), [255, 255, 255]).save(tmp_path / "a.png")
    assert not read_labels(tmp_path / "a.png").any()


def test_mpo(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 10:40] = 255
    Image.fromarray(mask).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(mask)])
    with pytest.raises(UserError, match="is compressed as JPEG, which"):
        read_labels(tmp_path / "a.mpo")


@pytest.mark.parametrize(("parts", "expected"), [(3, False), (4, True)])
def test_objects_of_a_few_parts_are_ids(parts, expected):
    labels = np.zeros((3, 2 * parts), np.uint8)
    labels[0, ::2], labels[2, ::2] = 1, 2
    assert scattered(labels) == expected
