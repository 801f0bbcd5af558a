"""The files of a predicted image. Each appears under its final name when it is whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np

from ..data.readers import Reader, open_image
from ..files import replacing, write_png
from .overlay import outline
from .polygons import GeojsonFile
from .stitching import Stitcher
from .tiled_tiff import TiledTiff

VIEWED = 1000  # outlines stay visible when the longer side is shrunk to so many pixels


def full_mpp(image: Reader) -> float | None:
    """Microns per pixel of an image at its full size."""
    return None if image.mpp is None else image.mpp * image.size[0] / image.full_size[0]


def open_streams(image: Reader, files: dict[str, Path], stack: ExitStack) -> dict[str, TiledTiff]:
    """A TIFF file of the size of the image for each file, by what it holds.

    They get their final names when the stack closes without an error, the first one last.
    """
    streams = {}
    for kind, file in files.items():
        dtype, channel = ("uint8", None) if kind == "mask" else ("float16", kind)
        part = stack.enter_context(replacing(file))
        streams[kind] = stack.enter_context(TiledTiff(part, image.full_size, dtype, full_mpp(image), channel))
    return streams


def open_instances(
    image: Reader, labels: Path, polygons: Path, seed_level: float, least_area: int, stack: ExitStack
) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    """Open label image and polygons of an image that is not held as a whole; they are finished as the stack closes.

    -> a function that takes mask and sdf of the next rows, and returns the rows of the label image that it wrote.
    """
    geojson = stack.enter_context(GeojsonFile(stack.enter_context(replacing(polygons)), image.path.name))
    part = stack.enter_context(replacing(labels))
    stream = stack.enter_context(TiledTiff(part, image.full_size, "uint32", full_mpp(image)))
    stitcher = Stitcher(image.full_size, geojson.write, seed_level, least_area, name=image.path)

    def write(mask: np.ndarray, sdf: np.ndarray | None) -> np.ndarray:
        rows = stitcher.add(mask, sdf)
        stream.write(rows)
        return rows

    return write


def write_overlay(image: Reader, objects: np.ndarray, file: Path) -> None:
    """Write an image at its full size with the outlines of objects (H, W), 1/VIEWED of its longer side wide."""
    thickness = max(1, max(image.full_size) // VIEWED)
    with nullcontext(image) if image.size == image.full_size else open_image(image.path) as full:
        write_png(file, outline(full.read(0, 0, *full.size), objects, thickness=thickness))


def write_labels(path: Path, labels: np.ndarray, mpp: float | None) -> None:
    """Write a label image (H, W) as a PNG of 16 bits, or as a TIFF of 32 bits if it has labels above 65,535.

    mpp: microns per pixel, which the TIFF says.
    """
    wide = path.with_suffix(".tif")
    if labels.max() <= np.iinfo(np.uint16).max:
        write_png(path, labels.astype(np.uint16))
        wide.unlink(missing_ok=True)  # of an earlier call
    else:
        with replacing(wide) as part, TiledTiff(part, labels.shape, "uint32", mpp) as file:
            file.write(labels)
        path.unlink(missing_ok=True)
