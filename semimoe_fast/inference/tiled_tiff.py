"""Write one channel of an image of any size, row by row, as a tiled and compressed BigTIFF.

tifffile has to be given the pixels by an iterator, so several files written at once would each need a thread; and it
refuses float16 in OME-TIFF. The format is small: a header, the tiles, and one table of tags at the end.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import quoteattr

import numpy as np

from ..errors import naming, printable

SIDE = 512  # of the tiles of the file
LEVEL = 1  # of zlib: probabilities hardly get smaller at higher levels

ASCII, SHORT, LONG, RATIONAL, LONG8 = 2, 3, 4, 5, 16  # types of TIFF
SIZES = {ASCII: "s", SHORT: "H", LONG: "I", RATIONAL: "II", LONG8: "Q"}
DEFLATE, UNSIGNED, FLOAT, PER_CENTIMETER, BLACK_IS_ZERO = 8, 1, 3, 3, 1


class TiledTiff:
    """A TIFF file of `size` (H, W) and `dtype`, uint8, uint32, float16 or float32; a context manager.

    mpp: microns per pixel. channel: its name; with it the file is an OME-TIFF. Bio-Formats reads float16 as float32,
    which is what its OME-XML says, because OME has no name for float16. The memory is that of SIDE rows.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], dtype: str, mpp: float | None = None, channel: str | None = None
    ) -> None:
        self.path, self.size, self.mpp, self.channel = path, size, mpp, channel
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._rows = np.zeros((SIDE, -(-size[1] // SIDE) * SIDE), self.dtype)  # the row of tiles that is being filled
        self._filled = self._written = 0  # rows of it, and rows of the tiles before it
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._file = path.open("wb")
        self._file.write(bytes(16))  # place of the header

    def write(self, rows: np.ndarray) -> None:
        """Add the next rows (n, W)."""
        while len(rows):
            count = min(SIDE - self._filled, len(rows))
            self._rows[self._filled : self._filled + count, : self.size[1]] = rows[:count]
            self._filled += count
            rows = rows[count:]
            if self._filled == SIDE or self._written + self._filled == self.size[0]:
                self._write_tiles()

    def _write_tiles(self) -> None:
        for tile in np.split(self._rows, self._rows.shape[1] // SIDE, axis=1):
            data = zlib.compress(np.ascontiguousarray(tile), LEVEL)
            self._offsets.append(self._file.tell())
            self._lengths.append(len(data))
            with naming(self.path):
                self._file.write(data)
        self._written += self._filled
        self._filled = 0
        self._rows[:] = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with naming(self.path):
            try:
                if kind is None:
                    self._finish()
            finally:
                self._file.close()

    def _finish(self) -> None:
        """Write the table of tags and the header. Raises ValueError if rows are missing."""
        height, width = self.size
        if self._written != height:
            raise ValueError(f"{self._written} rows of {height} are written")
        tags = {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [8 * self.dtype.itemsize]),
            259: (SHORT, [DEFLATE]),
            262: (SHORT, [BLACK_IS_ZERO]),
            277: (SHORT, [1]),  # samples per pixel
            322: (LONG, [SIDE]),
            323: (LONG, [SIDE]),
            324: (LONG8, self._offsets),
            325: (LONG8, self._lengths),
            339: (SHORT, [FLOAT if self.dtype.kind == "f" else UNSIGNED]),
        }
        if self.channel is not None:
            tags[270] = ASCII, [self._ome() + b"\0"]
        if self.mpp is not None:
            tags[282] = tags[283] = RATIONAL, [round(1e7 / self.mpp), 1000]
            tags[296] = SHORT, [PER_CENTIMETER]
        entries = [self._entry(tag, *tags[tag]) for tag in sorted(tags)]
        table = self._file.seek(-(-self._file.tell() // 8) * 8)
        self._file.write(struct.pack("<Q", len(entries)) + b"".join(entries) + bytes(8))
        self._file.seek(0)
        self._file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, table))

    def _entry(self, tag: int, kind: int, values: list) -> bytes:
        """An entry of the table; values of more than 8 bytes go to the file, and the entry says where they are."""
        if kind == ASCII:
            count, data = len(values[0]), values[0]
        else:
            count = len(values) // len(SIZES[kind])
            data = struct.pack(f"<{len(values) // len(SIZES[kind]) * SIZES[kind]}", *values)
        if len(data) > 8:
            place = self._file.tell()
            self._file.write(data)
            data = struct.pack("<Q", place)
        return struct.pack("<HHQ", tag, kind, count) + data.ljust(8, b"\0")

    def _ome(self) -> bytes:
        """OME-XML of one plane, in ASCII."""
        (height, width), kind = self.size, "float" if self.dtype.kind == "f" else self.dtype.name
        physical = "" if self.mpp is None else f' PhysicalSizeX="{self.mpp:.6g}" PhysicalSizeY="{self.mpp:.6g}"'
        return (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" '
            f'Type="{kind}" SizeX="{width}" SizeY="{height}" SizeC="1" SizeZ="1" SizeT="1"{physical}>'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1" Name={quoteattr(printable(self.channel))}/>'
            '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
        ).encode("ascii", "xmlcharrefreplace")
