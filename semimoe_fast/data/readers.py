"""Read RGB images by region, at their own scale or resampled to a given one.

`open_image` opens any supported file. A reader gives regions as uint8 (height, width, 3); it may be used from several
threads. Files that cannot be read raise UserError, which names the file and the remedy; a region outside the image is
a ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from . import resampling
from .folders import read_image
from .regions import Reader, plausible_mpp

TIFF_SIGNATURES = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
SLIDES = frozenset(".svs .ndpi .mrxs .scn .vms .vmu .bif .svslide .czi .dcm".split())  # suffixes that OpenSlide reads
BAND_BYTES = 2**23  # of the pixels that are resampled at a time
SCALES = 0.01, 16.0  # smallest and largest scale that makes sense: pixels per pixel of a file
SAME = 0.02  # scales that differ by less are taken as equal, such as 0.2528 and 0.25 microns a pixel

# Pillow warns above half the size that it refuses. Users who set a filter of their own keep it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


class ArrayReader(Reader):
    """An image in memory, uint8 (H, W, 3)."""

    def __init__(self, pixels: np.ndarray, path: Path | None = None, mpp: float | None = None) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"an image is uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}")
        super().__init__(pixels.shape[:2], path, mpp)
        self.pixels = pixels

    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        return self.pixels[row : row + height, column : column + width]

    def close(self) -> None:
        """There is no file; the pixels are freed with the reader."""


class Resampled(Reader):
    """Another reader's image at another size; see resampling.py for the filter. Closing it closes the other."""

    def __init__(self, source: Reader, size: tuple[int, int]) -> None:
        mpp = None if source.mpp is None else source.mpp * source.size[0] / size[0]
        super().__init__(size, source.path, mpp)
        self.source = source

    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        columns, column_weights = resampling.weights(self.source.size[1], self.size[1], column, width)
        row_bytes = 3 * (columns.stop - columns.start) * self.source.size[0] / self.size[0]
        step = max(1, int(BAND_BYTES / row_bytes))
        bands = []
        for start in range(row, row + height, step):
            rows, row_weights = resampling.weights(
                self.source.size[0], self.size[0], start, min(step, row + height - start)
            )
            pixels = self.source.read(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
            bands.append(resampling.apply(row_weights, column_weights, pixels))
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def close(self) -> None:
        self.source.close()


def open_image(path: Path, scale: float | None = None, mpp: float | None = None) -> Reader:
    """Open an image file at its own scale, at `scale` pixels per pixel of the file, or at `mpp` microns a pixel.

    Sides are rounded to whole pixels, at least 1. The smallest level of a pyramid that has enough resolution is
    resampled, or read as it is if it differs from `mpp` by less than 2 %. With `mpp`, `Reader.note` says so, unless the
    file is read at its own scale. Raises UserError for files that cannot be read and, with `mpp`, do not say their
    resolution or would be read at a scale outside SCALES.
    """
    return at_scale(open_levels(Path(path)), scale, mpp)


def open_levels(path: Path) -> Sequence[Reader]:
    """The image of a file and its smaller copies, largest first. They share the file: closing the first closes it.

    Raises UserError for files that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such image file; give a regular file")
    if path.suffix.lower() in SLIDES:
        from . import slides

        return slides.open_levels(path)
    if _is_tiff(path):
        from . import tiff

        try:
            return tiff.open_levels(path)
        except tiff.NotByRegion as reason:
            return [_decoded(path, f" ({reason})")]
    return [_decoded(path)]


def _is_tiff(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in TIFF_SIGNATURES
    except OSError:  # decoding raises the clear error
        return False


def mpp_of(path: Path) -> float | None:
    """Microns per pixel that an image file says, slides apart; None if it says nothing plausible. Decodes no pixels."""
    try:
        if _is_tiff(path):
            from . import tiff

            return tiff.mpp_of(path)
        with Image.open(path) as image:
            return plausible_mpp(25400 / image.info["dpi"][0])
    except Exception:  # no resolution, or 0; or the file is damaged, and reading it raises the clear error
        return None


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Sides times `scale`, in whole pixels, at least 1."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _decoded(path: Path, reason: str = "") -> ArrayReader:
    """An image that Pillow decodes as a whole, because its format or the reason in parentheses leaves no other way."""
    try:
        Image.open(path).close()
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"{path} has more than {most:,} pixels and cannot be read by region{reason}: save it as a tiled TIFF"
        ) from error
    except Exception:  # Pillow cannot read the file, and read_image raises the clear error
        pass
    return ArrayReader(read_image(path), path, mpp_of(path))


def at_scale(levels: Sequence[Reader], scale: float | None = None, mpp: float | None = None) -> Reader:
    """The image of `open_levels` at a scale, as `open_image` gives it. An error closes the file."""
    try:
        return _at_scale(levels, scale, mpp)
    except BaseException:
        levels[0].close()
        raise


def _at_scale(levels: Sequence[Reader], scale: float | None, mpp: float | None) -> Reader:
    if scale is not None and mpp is not None:
        raise ValueError("give scale or mpp, not both")
    for name, value in (("scale", scale), ("mpp", mpp)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name} must be a positive number, not {value}")
    full = levels[0]
    if mpp is not None:
        scale = _scale_of(full, mpp)
    if scale is None:
        return full
    size = scaled_size(full.size, scale)
    enough = [level for level in levels if min(np.divide(level.size, size)) > 1 - SAME]
    reader = enough[-1] if enough else full
    same = reader.size == size if mpp is None else abs(reader.mpp / mpp - 1) < SAME
    if not same:
        reader = Resampled(reader, size)
    reader.full_size = full.size
    if mpp is not None and reader is not full:
        reader.note = f"{full.path} has {full.mpp:.4g} microns a pixel and is read at {reader.mpp:.4g}"
    return reader


def _scale_of(full: Reader, mpp: float) -> float:
    """Pixels at `mpp` microns a pixel per pixel of a file. Raises UserError if it is unknown or outside SCALES."""
    if full.mpp is None:
        raise UserError(
            f"{full.path} does not say how large its pixels are: save it with its resolution (TIFF tags, OME-XML, "
            "dpi of a PNG), or give a scale (--scale) instead of microns (--mpp)"
        )
    return scale_between(full.path, full.mpp, mpp)


def scale_between(path: Path | None, own: float, mpp: float) -> float:
    """Pixels at `mpp` microns a pixel per pixel of a file of `own`. Raises UserError outside SCALES."""
    scale = own / mpp
    if not SCALES[0] <= scale <= SCALES[1]:
        raise UserError(
            f"{path} has {own:.4g} microns a pixel and would be read at {mpp:.4g}, {scale:.3g} pixels per "
            f"pixel of the file: choose microns at which they are {SCALES[0]:g} to {SCALES[1]:g}, or correct its "
            "resolution"
        )
    return scale
