"""Files whose first page is not the image are refused, by both readers of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from refusals import refused

from semimoe_fast.data.folders import read_image, read_labels
from semimoe_fast.data.readers import open_image

COLORS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
CHANNELS = np.ascontiguousarray(COLORS.transpose(2, 0, 1))


def thumbnail_first(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        file.write(COLORS[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(COLORS, photometric="rgb")


def composite(path: Path) -> None:
    tifffile.imwrite(path, CHANNELS, imagej=True, metadata={"axes": "CYX", "mode": "composite"})


def ome_channels(path: Path) -> None:
    tifffile.imwrite(path, CHANNELS, ome=True, photometric="minisblack", metadata={"axes": "CYX"})


@pytest.mark.parametrize("read", [read_image, read_labels, open_image])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (thumbnail_first, "starts with a smaller copy, 15 x 10 pixels, and its page 2 is 60 x 40: save the largest"),
        (composite, "stores its 3 channels as pages: save it as RGB"),
        (ome_channels, "stores its 3 channels as pages: save it as RGB"),
    ],
)
def test_first_page_that_is_not_the_image_is_refused(
    tmp_path: Path, read: Callable[[Path], object], write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "a.ome.tif"
    write(path)
    assert refused(read, path).startswith(f"{path} {message}")


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_channels_within_a_page_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, COLORS, photometric="rgb", **{kind: True})
    np.testing.assert_array_equal(read_image(path), COLORS)
    with open_image(path) as image:
        np.testing.assert_array_equal(image.read(0, 0, *image.size), COLORS)
