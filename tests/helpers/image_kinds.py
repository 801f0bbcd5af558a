"""Image files of every kind that Pillow and tifffile write, each with the pixels that a reader has to find in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 40, 56
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
COLORS = np.stack([5 * ROWS, 4 * COLUMNS, 255 - 2 * ROWS - COLUMNS], -1).astype(np.uint8)
MASK = ((ROWS - 20) ** 2 + (COLUMNS - 20) ** 2 < 150) | (COLUMNS > 48)

# of each format that is exact: what makes it so
EXACT = {name: {} for name in "PNG BMP DIB PPM TGA PCX SGI IM MSP XBM QOI".split()} | {
    "WEBP": {"lossless": True},
    "ICO": {"sizes": [(WIDTH, HEIGHT)]},
    "JPEG2000": {"irreversible": False},
}
LOSSY = "JPEG JPEG2000 WEBP AVIF GIF".split()
LOSSY_OPTIONS = {"JPEG2000": {"irreversible": True, "quality_layers": [3]}}
PILLOW_TIFF = "raw packbits tiff_lzw tiff_adobe_deflate group3 group4 jpeg lzma zstd".split()
DEEP = ("I", "I;16", "F")


@dataclass
class File:
    """An image file; a reader gives these pixels or raises UserError. None: any pixels of the right size."""

    path: Path
    image: np.ndarray | None  # uint8 (H, W, 3)
    mask: np.ndarray | None  # uint8 (H, W), 0 and 1
    exact: bool = True  # otherwise the image may differ as lossy compression does, but never the mask


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, ...) as they are stored -> upright, by the definition of the EXIF orientation."""
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}[
        orientation
    ]
    pixels = pixels[::rows, ::columns]
    return pixels.swapaxes(0, 1) if orientation > 4 else pixels


def pillow_files(folder: Path) -> Iterator[File]:
    """Every format, compression and mode that Pillow writes and reads, and every orientation."""
    Image.init()
    for name, picture, mask in [*pictures(), *masks()]:
        kinds = [(kind, options, True) for kind, options in EXACT.items()]
        kinds += [(kind, LOSSY_OPTIONS.get(kind, {}), False) for kind in LOSSY]
        kinds += [("TIFF", {"compression": how}, how != "jpeg") for how in PILLOW_TIFF]
        for kind, options, exact in kinds:
            how = options.get("compression", "exact" if exact else "lossy")
            path = folder / f"{name} {kind} {how}.{kind.lower()}"
            try:
                picture.save(path, kind, **options)
            except (OSError, ValueError, KeyError, SystemError):  # not a mode or compression of this format
                path.unlink(missing_ok=True)
                continue
            shown = None if picture.mode in DEEP else np.array(picture.convert("RGB"))
            yield File(path, shown, mask, exact and picture.mode != "YCbCr")  # libtiff rounds its colors otherwise
    for orientation in range(1, 9):
        for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
            for mode in ("L", "RGB"):
                picture = Image.fromarray(COLORS).convert(mode)
                exif = Image.Exif()
                exif[0x0112] = orientation
                path = folder / f"{mode} turned {orientation}.{kind.lower()}"
                picture.save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
                shown = turned(np.array(picture.convert("RGB")), orientation)
                yield File(path, shown, None, kind != "JPEG")


def pictures() -> list[tuple[str, Image.Image, None]]:
    colors = Image.fromarray(COLORS)
    with_alpha = np.dstack([COLORS, 255 - COLORS[..., 0]])
    modes = {mode: colors.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")}
    modes |= {"LA": Image.fromarray(with_alpha).convert("LA"), "RGBA": Image.fromarray(with_alpha)}
    modes |= {mode: Image.fromarray(COLORS[..., 0].astype(kind) * 257) for mode, kind in DEPTHS.items()}
    return [(f"picture {mode}", picture, None) for mode, picture in modes.items()]


DEPTHS = {"I": np.int32, "I;16": np.uint16, "F": np.float32}


def masks() -> list[tuple[str, Image.Image, np.ndarray]]:
    """Masks as annotation programs write them. In a palette image the index counts, whatever its color is."""
    ones = MASK.astype(np.uint8)
    kinds = {"1": Image.fromarray(MASK), "L 255": Image.fromarray(ones * 255), "L 1": Image.fromarray(ones)}
    for name, palette in {"P": [0, 0, 0, 255, 255, 255], "P red": [0, 0, 0, 255, 0, 0]}.items():
        kinds[name] = Image.fromarray(ones)
        kinds[name].putpalette(palette)
    for mode in ("RGB", "RGBA", "LA"):
        kinds[mode] = Image.fromarray(ones * 255).convert(mode)
    kinds |= {mode: Image.fromarray(ones.astype(kind) * 300) for mode, kind in DEPTHS.items()}
    return [(f"mask {name}", picture, ones) for name, picture in kinds.items()]


def tifffile_files(folder: Path) -> Iterator[File]:
    """Depths, channels, planes, compressions, tiles, byte orders and orientations of tifffile."""
    layouts = {"strips": {"rowsperstrip": 7}, "tiles": {"tile": (16, 32)}, "whole": {}}
    for dtype in ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8", "c8"):
        for channels, planar in (("gray", None), ("rgb", "contig"), ("rgb", "separate"), ("rgba", "contig")):
            for layout, options in layouts.items():
                for compression in (None, "zlib"):
                    name = " ".join(filter(None, [dtype, channels, planar, layout, compression]))
                    yield from _tiff(
                        folder / f"{name}.tif", dtype, channels, planar, compression=compression, **options
                    )
    for options in (
        {"byteorder": ">"},
        {"bigtiff": True},
        {"predictor": True, "compression": "zlib"},
        {"photometric": "miniswhite"},
        *({"orientation": orientation} for orientation in range(2, 9)),
    ):
        for dtype in ("bool", "u1", "u2"):
            for channels in ("gray", "rgb"):
                if not (channels == "rgb" and "photometric" in options):
                    name = f"{dtype} {channels} " + " ".join(f"{key} {value}" for key, value in options.items())
                    yield from _tiff(folder / f"{name.replace('>', 'big')}.tif", dtype, channels, **options)


def _tiff(
    path: Path, dtype: str, channels: str, planar: str | None = None, orientation: int = 1, **options: object
) -> Iterator[File]:
    eight = dtype == "u1"
    white_is_zero = options.get("photometric") == "miniswhite"
    values = np.dstack([COLORS, 255 - COLORS[..., :1]]) if eight else np.dstack([MASK] * 4)
    values = values[..., {"gray": slice(0, 1), "rgb": slice(0, 3), "rgba": slice(0, 4)}[channels]]
    stored = values.astype(dtype)
    stored = stored[..., 0] if channels == "gray" else stored
    stored = stored.transpose(2, 0, 1) if planar == "separate" else stored
    options = {"photometric": "minisblack" if channels == "gray" else "rgb", "metadata": None} | options
    options |= {} if planar is None else {"planarconfig": planar}
    options |= {"extrasamples": ["unassalpha"]} if channels == "rgba" else {}
    if orientation > 1:
        options["extratags"] = [(274, "H", 1, orientation, True)]
    try:
        tifffile.imwrite(path, stored, **options)
    except Exception:  # tifffile does not write this kind
        path.unlink(missing_ok=True)
        return
    shown = None
    if eight:
        shown = np.repeat(values, 3, -1) if channels == "gray" else values[..., :3]
        shown = turned(255 - shown if white_is_zero else shown, orientation)
    mask = None if eight else turned(MASK.astype(np.uint8), orientation)
    if dtype == "bool":
        picture = mask[..., None].repeat(3, -1) * np.uint8(255)
        shown, mask = (255 - picture, 1 - mask) if white_is_zero else (picture, mask)
    yield File(path, shown, None if white_is_zero and dtype != "bool" else mask)
