"""Read 8-bit TIFF files by region: only the tiles or strips that a region touches are read and decoded.

tifffile reads the tags and decodes single tiles. Pyramids are the reduced copies in SubIFDs or in further pages so
flagged; Aperio's have no flag and are known by the first page's description.
"""

from __future__ import annotations

import html
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from threading import Lock

import numpy as np
import tifffile
from tifffile import TiffPage

from ..errors import UserError, first_sentence, warn
from .folders import too_deep
from .pages import require_channels, require_largest, warn_of_pages
from .regions import Reader, plausible_mpp

KEPT_BYTES = 128 * 2**20  # of decoded tiles, for each open file; a row of 256 x 256 tiles of a slide has about 80 MB
MOST_TILE_BYTES = 2**28  # of one tile or strip
ROW_BYTES = 2**18  # of the rows of an uncompressed image that are read together
MOST_PAGES = 100  # that are looked at
GRAY_INVERTED, GRAY, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # values of the tag PhotometricInterpretation
JPEG = 6, 7, 33007, 34892  # values of the tag Compression
ASSOCIATED_ALPHA = 1  # a value of the tag ExtraSamples: colors are multiplied by alpha
MICRONS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0}
MICRONS |= {"micron": 1.0, r"\u00B5m": 1.0}  # as ImageJ writes it
REMEDY = "copy it again or save it again as a tiled TIFF"

# Without a handler its messages about each damaged tag go to stderr; what matters is in our own messages.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class NotByRegion(Exception):
    """A TIFF that only Pillow may read. The message says why, and what would help."""


def open_levels(path: Path) -> list[Reader]:
    """The first image of a TIFF and its smaller copies, largest first; closing the first closes the file.

    Raises NotByRegion, and UserError for wrong tags and for more than 8 bits per channel. Warns of other pages.
    """
    file = SharedFile(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            first = tiff.pages[0]
            _check(path, first)
            require_channels(path, first.description, first.samplesperpixel)
            mpp = resolution(first)
            levels = [PageReader(file, first, mpp)]
            others = 0
            for number, page in enumerate(_further_pages(path, tiff), 2):
                require_largest(path, levels[0].size[::-1], (page.imagewidth, page.imagelength), number)
                if not _is_level(first, page):
                    others += not page.is_subifd
                elif page.imagewidth < levels[-1].size[1]:
                    level_mpp = None if mpp is None else mpp * first.imagelength / page.imagelength
                    levels.append(PageReader(file, page, level_mpp))
        turn = _orientation(first)
    except (NotByRegion, UserError):
        file.close()
        raise
    except Exception as error:  # for damaged tags tifffile raises almost any exception
        file.close()
        raise NotByRegion(f"its tags cannot be read ({first_sentence(error)})") from error
    if others:
        warn_of_pages(path, f"more than {MOST_PAGES}" if others + 1 >= MOST_PAGES else others + 1)
    return levels if turn == (False, False, False) else [Turned(level, turn) for level in levels]


class SharedFile:
    """A file that is read from several threads, and what is decoded of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        self.decoded: OrderedDict[Hashable, np.ndarray] = OrderedDict()  # the least recently used tile is first
        self.bytes = 0  # of decoded tiles
        self.lock = Lock()

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`. Raises UserError if the file ends before, or cannot be read any more."""
        try:
            data = os.pread(self.file.fileno(), count, offset)
        except (OSError, OverflowError) as error:
            raise UserError(f"{self.path} cannot be read at byte {offset} ({error}): {REMEDY}") from error
        if len(data) < count:
            raise UserError(f"{self.path} is truncated ({count} bytes at {offset} are missing): {REMEDY}")
        return data

    def recall(self, key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile of a key, decoded if it is not among those that are kept."""
        with self.lock:
            if key in self.decoded:
                self.decoded.move_to_end(key)
                return self.decoded[key]
        tile = decode()  # without the lock: threads decode together
        with self.lock:
            if key not in self.decoded:
                self.decoded[key] = tile
                self.bytes += tile.nbytes
                while self.bytes > KEPT_BYTES and len(self.decoded) > 1:
                    self.bytes -= self.decoded.popitem(last=False)[1].nbytes
        return tile

    def close(self) -> None:
        self.file.close()
        with self.lock:
            self.decoded.clear()
            self.bytes = 0


class PageReader(Reader):
    """One image of a TIFF, as it is stored. The image is cut into a grid of tiles; a strip is as wide as the image."""

    def __init__(self, file: SharedFile, page: TiffPage, mpp: float | None) -> None:
        super().__init__((page.imagelength, page.imagewidth), file.path, mpp)
        self.file = file
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.samples = page.samplesperpixel // self.planes  # in each plane
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        self.whole = page.is_final  # one run of uncompressed rows, which is cut as we like
        self.options = {}
        if page.compression in JPEG:
            self.options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        row_bytes = page.imagewidth * self.samples
        if self.whole:
            self.tile = min(page.imagelength, max(1, ROW_BYTES // row_bytes)), page.imagewidth
        elif page.is_tiled:
            self.tile = page.tilelength, page.tilewidth
        else:
            self.tile = min(page.imagelength, page.rowsperstrip), page.imagewidth
        self.tile_bytes = self.tile[0] * self.tile[1] * self.samples
        if page.is_tiled and not 0 < self.tile_bytes <= MOST_TILE_BYTES:
            size = f"{self.tile[1]} x {self.tile[0]} pixels"
            raise UserError(f"{file.path} has wrong tags or tiles that are too large, {size}; {REMEDY}")
        if not 0 < self.tile_bytes <= MOST_TILE_BYTES:
            raise NotByRegion(f"has strips of {self.tile[1]} x {self.tile[0]} pixels")
        self.grid = tuple(-(-side // step) for side, step in zip(self.size, self.tile, strict=True))
        tiles = 1 if self.whole else self.planes * self.grid[0] * self.grid[1]
        if min(len(self.offsets), len(self.counts)) < tiles:
            raise UserError(
                f"{file.path} has wrong tags: {page.imagewidth} x {page.imagelength} pixels need {tiles} tiles or "
                f"strips, not {min(len(self.offsets), len(self.counts))}; {REMEDY}"
            )
        if not all(isinstance(number, int) for number in (*self.offsets, *self.counts)):  # tags may be of any type
            raise UserError(f"{file.path} has wrong tags: its tiles or strips start or end between bytes; {REMEDY}")
        self.convert = _converter(page)
        self.decompress = page.decode  # a property that threads must not compute together

    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        output = np.empty((height, width, 3), np.uint8)
        for y in range(row // self.tile[0], -(-(row + height) // self.tile[0])):
            for x in range(column // self.tile[1], -(-(column + width) // self.tile[1])):
                tile = self.file.recall((id(self), y, x), lambda y=y, x=x: self.decode(y, x))
                top, left = y * self.tile[0] - row, x * self.tile[1] - column  # of the tile, in the output
                part = tile[max(0, -top) : height - top, max(0, -left) : width - left]
                top, left = max(0, top), max(0, left)
                output[top : top + part.shape[0], left : left + part.shape[1]] = part
        return output

    def decode(self, y: int, x: int) -> np.ndarray:
        """Tile (y, x) as RGB, uint8 (rows, columns, 3). Raises UserError if it is damaged."""
        load = self._rows if self.whole else self._tile
        planes = [load(plane, y, x) for plane in range(self.planes)]
        return self.convert(planes[0] if self.planes == 1 else np.concatenate(planes, 2))

    def _rows(self, plane: int, y: int, x: int) -> np.ndarray:
        """Rows of an uncompressed image, uint8 (rows, W, samples)."""
        begin = y * self.tile[0]
        rows = min(self.tile[0], self.size[0] - begin)
        row_bytes = self.size[1] * self.samples
        offset = self.offsets[0] + (plane * self.size[0] + begin) * row_bytes
        data = self.file.read(offset, rows * row_bytes)
        return np.frombuffer(data, np.uint8).reshape(rows, self.size[1], self.samples)

    def _tile(self, plane: int, y: int, x: int) -> np.ndarray:
        """A tile or strip, uint8 (rows, columns, samples)."""
        index = (plane * self.grid[0] + y) * self.grid[1] + x
        offset, count = self.offsets[index], self.counts[index]
        if count == 0:  # files may leave out empty tiles
            return np.zeros((*self.tile, self.samples), np.uint8)
        if count > 2 * self.tile_bytes + 2**16:  # no compression adds so much
            raise UserError(f"{self.path} has wrong tags: tile {index} has {count} bytes; {REMEDY}")
        data = self.file.read(offset, count)
        try:
            tile = self.decompress(data, index, **self.options)[0]
            rows = min(self.tile[0], self.size[0] - y * self.tile[0])
            columns = min(self.tile[1], self.size[1] - x * self.tile[1])
            tile = tile[0, :rows, :columns]
            if tile.shape != (rows, columns, self.samples) or tile.dtype != np.uint8:
                raise ValueError(f"it holds {tile.dtype} {tile.shape}")
        except Exception as error:  # for damaged data the codecs raise almost any exception
            where = f"tile {index} at byte {offset}"
            raise UserError(f"{self.path} is damaged, {where} ({first_sentence(error)}): {REMEDY}") from error
        return tile

    def close(self) -> None:
        self.file.close()


class Turned(Reader):
    """An image upright: `turn` says if rows and columns are exchanged, and then if rows and columns are reversed."""

    def __init__(self, stored: Reader, turn: tuple[bool, bool, bool]) -> None:
        super().__init__(stored.size[::-1] if turn[0] else stored.size, stored.path, stored.mpp)
        self.stored = stored
        self.turn = turn

    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        exchanged, rows_reversed, columns_reversed = self.turn
        if rows_reversed:
            row = self.size[0] - row - height
        if columns_reversed:
            column = self.size[1] - column - width
        if exchanged:
            pixels = self.stored.read(column, row, width, height).swapaxes(0, 1)
        else:
            pixels = self.stored.read(row, column, height, width)
        return np.ascontiguousarray(pixels[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1])

    def close(self) -> None:
        self.stored.close()


def mpp_of(path: Path) -> float | None:
    """Microns per pixel of the first image of a TIFF. Damaged tags raise almost any exception."""
    with tifffile.TiffFile(path) as file:
        return resolution(file.pages[0])


def resolution(page: TiffPage) -> float | None:
    """Microns per pixel, of OME-XML, of Aperio's or ImageJ's description or of the tags; None if nothing plausible."""
    description = page.description
    if found := re.search(r'\bPhysicalSizeX="([^"]+)"', description):
        unit = re.search(r'\bPhysicalSizeXUnit="([^"]+)"', description)
        return plausible_mpp(found[1], MICRONS.get(html.unescape(unit[1]) if unit else "µm"))
    if found := re.search(r"\bMPP\s*=\s*([\d.]+)", description):
        return plausible_mpp(found[1])
    tag, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    microns = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit else 2)
    if description.startswith("ImageJ=") and (found := re.search(r"^unit=(\S+)$", description, re.MULTILINE)):
        microns = MICRONS.get(found[1])
    if tag is None or microns is None or 0 in tag.value:
        return None
    return plausible_mpp(tag.value[1] / tag.value[0], microns)


def _check(path: Path, page: TiffPage) -> None:
    """Raise UserError for more than 8 bits or no pixels, NotByRegion for a layout that this reader does not know."""
    sides = page.imagewidth, page.imagelength, page.tilewidth, page.tilelength, page.rowsperstrip
    if 0 in sides[:2] or not all(isinstance(side, int) for side in sides):  # tags may be of any type
        raise UserError(f"{path} has wrong tags: {page.imagewidth} x {page.imagelength} pixels; {REMEDY}")
    if np.max(page.bitspersample) > 8:
        raise too_deep(path, f"{np.max(page.bitspersample)} bits")
    if page.dtype != np.uint8 or page.bitspersample != 8 or page.fillorder != 1:
        raise NotByRegion(f"has {page.bitspersample} bits per channel")
    if page.imagedepth != 1 or page.photometric not in (GRAY_INVERTED, GRAY, RGB, PALETTE, YCBCR):
        raise NotByRegion(f"has the photometric interpretation {page.photometric}")
    if page.photometric == YCBCR and page.compression not in JPEG:
        raise NotByRegion("has YCbCr colors without JPEG compression")
    if page.photometric in (RGB, YCBCR) and page.samplesperpixel < 3:
        raise NotByRegion(f"has {page.samplesperpixel} color channels")
    for codecs, key in ((tifffile.TIFF.DECOMPRESSORS, page.compression), (tifffile.TIFF.UNPREDICTORS, page.predictor)):
        try:
            codecs[key]
        except KeyError as error:
            remedy = ": install it with pip install imagecodecs" if "imagecodecs" in str(error) else ""
            raise NotByRegion(f"{str(error)[1:-1]}{remedy}") from error


def _converter(page: TiffPage) -> Callable[[np.ndarray], np.ndarray]:
    """What makes RGB, uint8 (..., 3), of the samples of a page, as Pillow does; alpha is dropped."""
    if page.photometric == PALETTE:
        colors = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        return lambda samples: colors[samples[..., 0]]
    if page.photometric == GRAY_INVERTED:
        return lambda samples: np.repeat(~samples[..., :1], 3, -1)
    colors = 1 if page.photometric == GRAY else 3
    if page.extrasamples[:1] == (ASSOCIATED_ALPHA,):
        return lambda samples: _as_rgb(_divided(samples[..., :colors], samples[..., colors : colors + 1]))
    return lambda samples: _as_rgb(samples[..., :colors])


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, -1)


def _divided(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors, uint8 (..., N), that are stored times alpha, uint8 (..., 1)."""
    quotient = np.minimum(255, colors.astype(np.int32) * 255 // np.maximum(alpha, 1))
    return np.where(alpha > 0, quotient, 0).astype(np.uint8)


def _orientation(page: TiffPage) -> tuple[bool, bool, bool]:
    """The `turn` of Turned, of the tag Orientation."""
    tag = page.tags.get("Orientation")
    value = int(tag.value) if tag else 1
    return value in (5, 6, 7, 8), value in (3, 4, 7, 8), value in (2, 3, 6, 7)


def _further_pages(path: Path, tiff: tifffile.TiffFile) -> Iterator[TiffPage]:
    """SubIFDs of the first page, then the pages after it. If their tags are damaged, a warning says so."""
    first = tiff.pages[0]
    try:
        for number in range(len(first.subifds or ())):
            yield first.pages[number]
    except Exception as error:  # for damaged tags tifffile raises almost any exception
        warn(f"{path}: its smaller copies cannot be read ({first_sentence(error)}); they are ignored")
    try:
        for number in range(1, MOST_PAGES):
            yield tiff.pages[number]
    except IndexError:  # after the last page
        pass
    except Exception as error:
        warn(f"{path}: pages after the first cannot be read ({first_sentence(error)}); they are ignored")


def _is_level(first: TiffPage, page: TiffPage) -> bool:
    """Whether a page is a smaller copy of the first: of its kind and of its shape, to a pixel of rounding.

    A further page must be flagged as reduced, or be Aperio's. Other pages of a smaller size may show anything.
    """
    if not (page.is_subifd or page.is_reduced or first.is_svs):
        return False
    kind = ("dtype", "photometric", "samplesperpixel", "compression", "is_tiled")
    smaller = 0 < page.imagewidth < first.imagewidth and page.imagelength > 0
    if not smaller or any(getattr(page, name) != getattr(first, name) for name in kind):
        return False
    shrinking = first.imagewidth / page.imagewidth
    return abs(first.imagelength / shrinking - page.imagelength) <= 1 + first.imagelength / first.imagewidth
