"""Image files of every kind, cut and as bombs: a reader gives the right pixels, or UserError with one line."""

from __future__ import annotations

import json
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from forks import in_fork
from image_kinds import File, pillow_files, tifffile_files
from PIL import Image

from semimoe_fast.data.folders import load_part, read_image, read_mask
from semimoe_fast.data.readers import open_image
from semimoe_fast.errors import UserError

CUTS = 20
LOSSY_ERROR = 16  # mean over the pixels, of 255; for unequal pixels 70 and more


def read_region(path: Path) -> np.ndarray:
    with open_image(path) as reader:
        return np.array(reader.read(0, 0, *reader.size))


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "read_image": read_image,
    "read_mask": read_mask,
    "open_image": read_region,
}


def right(pixels: np.ndarray, expected: np.ndarray | None, exact: bool) -> bool:
    if expected is None:
        return True
    if pixels.shape != expected.shape:
        return False
    return np.array_equal(pixels, expected) if exact else abs(pixels - expected.astype(float)).mean() < LOSSY_ERROR


def outcome(reader: str, path: Path, expected: np.ndarray | None, exact: bool) -> tuple[str, np.ndarray | None]:
    """What a reader makes of a file, and its pixels: a column of the table, or the reason of a failure."""
    try:
        pixels = READERS[reader](path)
    except UserError as error:
        return "one line" if "\n" not in str(error) else f"two lines: {error}", None
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
    return "worked" if right(pixels, expected, exact) else "wrong pixels", pixels


def outcomes_of(file: File) -> dict[str, str]:
    """Of the whole file and of its first parts, by each reader. A part may give no other pixels than the whole."""
    found = {}
    content = file.path.read_bytes()
    for reader in READERS:
        expected = file.mask if reader == "read_mask" else file.image
        found[reader], pixels = outcome(reader, file.path, expected, file.exact or reader == "read_mask")
        for cut in range(CUTS):
            part = file.path.with_stem(f"{file.path.stem} cut {cut}")
            part.write_bytes(content[: len(content) * cut // CUTS])
            found[f"{reader}, cut {cut}"], rest = outcome(reader, part, pixels, True)
            if rest is not None and pixels is None:
                found[f"{reader}, cut {cut}"] = "gives pixels, the whole file does not"
            part.unlink()
    return found


def replay(found: str) -> str:
    if found not in ("worked", "one line"):
        raise AssertionError(found)
    return found


def try_files(attempt, title: str, files: Iterable[File]) -> None:
    """Each file in a child of its own, which may crash."""
    for file in files:
        ended = in_fork(lambda file=file: print("\n" + json.dumps(outcomes_of(file))))
        if ended.status != 0:
            attempt(title, file.path.name, replay, f"status {ended.status}: {ended.output}")
            continue
        for name, found in json.loads(ended.output.splitlines()[-1]).items():
            attempt(f"{title}, cut" if "cut" in name else title, f"{file.path.name}, {name}", replay, found)


def test_pillow_kinds(attempt, tmp_path: Path) -> None:
    try_files(attempt, "images of Pillow", pillow_files(tmp_path))


def test_tifffile_kinds(attempt, tmp_path: Path) -> None:
    try_files(attempt, "images of tifffile", tifffile_files(tmp_path))


# ------------------------------------------------------------------------------------------------------------- bombs


def png(width: int, height: int, depth: int, content: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(2**28), 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def tiff(width: int, height: int, circle: bool = False, **tags: int) -> bytes:
    """One strip or tile of deflated zeros."""
    data = zlib.compress(bytes(2**20), 9)
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1} | {int(tag[1:]): n for tag, n in tags.items()}
    first, second = (324, 325) if 322 in entries else (273, 279)
    entries |= {first: 8, second: len(data)}
    place = 8 + len(data)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    after = struct.pack("<I", place if circle else 0)
    return b"II*\0" + struct.pack("<I", place) + data + struct.pack("<H", len(entries)) + body + after


def gif(width: int, height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02L\x01\x00;"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 58, 0, 54, 40, width, height, 1, 24, 0, 4, 1, 1, 0, 0) + bytes(4)


BOMBS: dict[str, Callable[[], bytes]] = {
    "60,000 squared.png": lambda: png(60_000, 60_000, 1, zlib.compress(bytes(7501 * 60_000), 9)),
    "2^31 squared.png": lambda: png(2**31 - 1, 2**31 - 1, 8, zlib.compress(b"\0")),
    "13,000 squared.png": lambda: png(13_000, 13_000, 1, zlib.compress(bytes(1626 * 13_000), 9)),
    "text.png": lambda: png(8, 8, 8, zlib.compress(bytes(72)), text_bomb()),
    "65,535 squared.gif": lambda: gif(65_535, 65_535),
    "2^31 squared.bmp": lambda: bmp(2**31 - 1, 2**31 - 1),
    "10^9 squared.ppm": lambda: b"P6 1000000000 1000000000 255\n",
    "100,000 squared.tif": lambda: tiff(100_000, 100_000, t278=100_000),
    "2^32 squared.tif": lambda: tiff(2**32 - 1, 2**32 - 1, t278=2**32 - 1),
    "tile of 2^31.tif": lambda: tiff(64, 64, t322=2**31, t323=2**31),
    "tile of 20,000.tif": lambda: tiff(64, 64, t322=20_000, t323=20_000),
    "no tile.tif": lambda: tiff(64, 64, t322=0, t323=0),
    "no pixel.tif": lambda: tiff(0, 0, t278=1),
    "pages in a circle.tif": lambda: tiff(1024, 1024, circle=True, t278=1024),
    "2^32 samples.tif": lambda: tiff(64, 64, t277=2**32 - 1, t278=64),
}


@pytest.mark.parametrize("reader", READERS)
def test_bombs(attempt, tmp_path: Path, reader: str) -> None:
    """With 3 GB of memory, and within a minute."""

    def case(name: str) -> str:
        path = tmp_path / name
        path.write_bytes(BOMBS[name]())

        def read() -> None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30,) * 2)
            READERS[reader](path)

        ended = in_fork(read, seconds=60)
        if ended.outcome == "failed":
            raise AssertionError(ended.output)
        return ended.outcome

    for name in BOMBS:
        attempt("decompression bombs", f"{reader} {name}", case, name)


def test_ten_thousand_files(attempt, tmp_path: Path) -> None:
    def case() -> None:
        for kind, mode in (("image", "RGB"), ("mask", "1")):
            folder = tmp_path / "val" / kind
            folder.mkdir(parents=True)
            Image.new(mode, (8, 8), 1).save(folder / "0.png")
            for number in range(1, 10_000):
                os.link(folder / "0.png", folder / f"{number}.png")

        def load() -> None:
            part = load_part(tmp_path, "val", 8, with_masks=True)
            assert part.images.shape == (10_000, 3, 8, 8)
            assert part.masks.all()

        ended = in_fork(load)
        if ended.status != 0:
            raise AssertionError(ended.output)

    attempt("10,000 files in a folder", "10,000", case)
