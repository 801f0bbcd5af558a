"""Read whole slides (.svs, .ndpi, .mrxs and others) by region through OpenSlide, the extra `slides`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from ..errors import UserError, first_sentence
from .regions import Reader, plausible_mpp

MOST_TILE_PIXELS = 2**28


def library() -> ModuleType:
    """The module openslide. Raises UserError if it is missing."""
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError without the shared library
        raise UserError(
            f"slides need OpenSlide ({first_sentence(error)}): pip install openslide-python openslide-bin"
        ) from error
    return openslide


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
