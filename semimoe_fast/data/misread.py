"""Image files that Pillow decodes to wrong pixels without an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..errors import UserError

PCX_PALETTE, PCX_MARK = 769, 12  # bytes at the end of the file that hold the palette, and the first of them
JP2, CODESTREAM, END = b"\0\0\0\x0cjP  ", b"jp2c", b"\xff\xd9"  # of JPEG 2000: signature, type of a box, last marker


def refuse_misread(path: Path, file: BinaryIO, image: Image.Image) -> None:
    """Raise UserError for a file, open in both ways, that Pillow misreads. The position in the file stays the same."""
    check = CHECKS.get(image.format or "")
    if check is None:
        return
    position = file.tell()
    reason = check(file, image)
    file.seek(position)
    if reason is not None:
        raise UserError(f"{path} {reason}")


def _bitmap(file: BinaryIO, image: Image.Image) -> str | None:
    """Pillow reads a palette of black and white as if it meant 1 bit a pixel."""
    header = 14 if image.format == "BMP" else 0
    file.seek(header)
    start = file.read(16)
    bits = start[14]
    if image.mode == "1" and start[0] >= 40 and bits != 1:  # a header of Windows
        return f"is a {image.format} of {bits} bits that Pillow misreads: save it as a PNG"
    return None


def _pcx(file: BinaryIO, image: Image.Image) -> str | None:
    """Pillow takes an image whose palette is cut off for a gray one."""
    if image.mode != "L":
        return None
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - PCX_PALETTE))
    return None if file.read(1)[0] == PCX_MARK else "has lost the end, which holds its palette: copy it again"


def _im(_: BinaryIO, image: Image.Image) -> str | None:
    """Pillow ignores a palette of grays in other than their natural order."""
    return "has a palette of grays, which Pillow ignores: save it as a PNG" if getattr(image, "lut", None) else None


def _jpeg_2000(file: BinaryIO, _: Image.Image) -> str | None:
    """A codestream that is cut between two layers gives pixels of lower quality."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    end = size
    if file.read(8) == JP2:
        place = 0
        while place < size:
            file.seek(place)
            length, kind = int.from_bytes(file.read(4)), file.read(4)
            length = {0: size - place, 1: int.from_bytes(file.read(8))}.get(length, length)
            place += max(8, length)
            if kind == CODESTREAM:
                end = place
                break
    file.seek(max(0, end - 2))
    return None if file.read(2) == END else "is cut off, so that details are missing: copy it again"


CHECKS = {"BMP": _bitmap, "DIB": _bitmap, "PCX": _pcx, "IM": _im, "JPEG2000": _jpeg_2000}
