"""Files that Pillow decodes to wrong pixels are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semimoe_fast.data.folders import read_image
from semimoe_fast.errors import UserError

GRAYS = np.random.default_rng(0).integers(0, 256, (32, 40), np.uint8)
COLORS = np.dstack([GRAYS, GRAYS.T.reshape(32, 40), 255 - GRAYS])


def palette(colors: list[int]) -> Image.Image:
    image = Image.fromarray(GRAYS % 2)
    image.putpalette(colors)
    return image


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("two.bmp", palette([0, 0, 0, 255, 255, 255]), "is a BMP of 8 bits that Pillow misreads"),
        ("two.dib", palette([0, 0, 0, 255, 255, 255]), "is a DIB of 8 bits that Pillow misreads"),
        ("two.im", palette([0, 0, 0, 255, 255, 255]), "has a palette of grays, which Pillow ignores"),
    ],
)
def test_palettes(tmp_path: Path, name: str, image: Image.Image, reason: str) -> None:
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} {reason}: save it as a PNG"):
        read_image(tmp_path / name)


def test_cut_palette(tmp_path: Path) -> None:
    path = tmp_path / "a.pcx"
    image = palette([255, 0, 0, 0, 255, 0])
    image.save(path)
    np.testing.assert_array_equal(read_image(path), np.array(image.convert("RGB")))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.pcx has lost the end"):
        read_image(path)
    Image.fromarray(GRAYS).save(path)  # whose palette is that of grays
    np.testing.assert_array_equal(read_image(path)[..., 0], GRAYS)


@pytest.mark.parametrize("suffix", [".jp2", ".j2k"])  # a file of boxes, and a codestream alone
def test_cut_layers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(COLORS).save(path, "JPEG2000", quality_layers=[8, 4, 1], no_jp2=suffix == ".j2k")
    whole = read_image(path)
    np.testing.assert_array_equal(whole, COLORS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 19 // 20])
    with pytest.raises(UserError, match="is cut off, so that details are missing: copy it again"):
        read_image(path)
    if suffix == ".jp2":  # another box may follow
        path.write_bytes(content + b"\0\0\0\x0cfree\0\0\0\0")
        np.testing.assert_array_equal(read_image(path), whole)
