"""Read whole slides (.svs, .ndpi, .mrxs and others) by region through OpenSlide, the extra `slides`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from ..errors import UserError, first_sentence
from .regions import Reader, plausible_mpp

MOST_TILE_PIXELS = 2**28
INDEXES = ".vms", ".vmu"  # suffixes of files that name the images of their slide
MOST_INDEX_BYTES = 2**20


def library() -> ModuleType:
    """The module openslide. Raises UserError if it is missing."""
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError without the shared library
        raise UserError(
            f"slides need OpenSlide ({first_sentence(error)}): pip install openslide-python openslide-bin"
        ) from error
    return openslide


def each_once(paths: Sequence[Path]) -> list[Path]:
    """The files of a folder without those that belong to the slide of another one.

    A .vms or .vmu file names the images that belong to its slide. The .dcm files of a series are one slide, for which
    the first one stands. Other formats have one file a slide beside a folder, or alone. Raises UserError for several
    .dcm files without OpenSlide, which tells their series.
    """
    parts = named_by_indexes(paths)
    dicom = [path for path in paths if path.suffix.lower() == ".dcm" and path.is_file()]
    found: set[str] = set()
    for path in dicom if len(dicom) > 1 else ():
        series = _series_of(path)
        if series in found:
            parts.add(path.name)
        found.add(series or path.name)
    return [path for path in paths if path.name not in parts]


def named_by_indexes(paths: Iterable[Path]) -> set[str]:
    """The names in the .vms and .vmu files among some files, which are those of other files of their slides."""
    return set[str]().union(*(_named_in(path) for path in paths if path.suffix.lower() in INDEXES and path.is_file()))


def _named_in(index: Path) -> set[str]:
    """The values of a .vms or .vmu file, lines of key=value, among which are the names of the files of its slide."""
    with index.open("rb") as file:
        lines = file.read(MOST_INDEX_BYTES).decode("utf-8", "surrogateescape").splitlines()
    return {line.partition("=")[2].strip() for line in lines}


def _series_of(path: Path) -> str | None:
    """What the .dcm files of a slide have in common; None if the file cannot be read, which opening it explains."""
    openslide = library()
    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except Exception:  # OpenSlideError, OSError, and others of damaged files
        return None


def open_levels(path: Path) -> list[Reader]:
    """The levels of a slide, largest first; closing the first closes the file. Raises UserError."""
    openslide = library()
    try:
        slide = openslide.OpenSlide(path)
        sizes = slide.level_dimensions
        for level in range(len(sizes)):
            require_tile_size(slide.properties, level)
    except Exception as error:  # OpenSlideError, OSError, and others of damaged files
        raise UserError(
            f"{path} cannot be read as a slide ({first_sentence(error)}): copy it again, with the files that belong "
            "to it, or save it as a tiled TIFF"
        ) from error
    mpp = plausible_mpp(slide.properties.get("openslide.mpp-x"))
    return [
        SlideReader(slide, path, level, (height, width), None if mpp is None else mpp * sizes[0][1] / height)
        for level, (width, height) in enumerate(sizes)
    ]


def require_tile_size(properties: Mapping[str, str], level: int) -> None:
    """Raise ValueError if damaged tags say that tiles are huge: OpenSlide would end the process for want of memory."""
    width, height = (int(properties.get(f"openslide.level[{level}].tile-{side}", 1)) for side in ("width", "height"))
    if width * height > MOST_TILE_PIXELS:
        raise ValueError(f"tiles of {width} x {height} pixels")


class SlideReader(Reader):
    """One level of a slide; where the slide has no pixels, its background color."""

    def __init__(self, slide: object, path: Path, level: int, size: tuple[int, int], mpp: float | None) -> None:
        super().__init__(size, path, mpp)
        self.slide = slide
        self.level = level
        self.background = f"#{slide.properties.get('openslide.background-color', 'ffffff')}"

    def _read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        full_width, full_height = self.slide.dimensions
        corner = column * full_width // self.size[1], row * full_height // self.size[0]  # in pixels of the full level
        try:
            pixels = self.slide.read_region(corner, self.level, (width, height))
        except Exception as error:  # OpenSlideError, and others of damaged files
            raise UserError(f"{self.path} is damaged ({first_sentence(error)}): copy it again") from error
        background = Image.new("RGB", pixels.size, self.background)
        background.paste(pixels, mask=pixels.getchannel("A"))
        return np.array(background)

    def close(self) -> None:
        self.slide.close()
