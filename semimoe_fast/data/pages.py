"""Image files with several pages: check that the first page holds the whole image."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from ..errors import UserError, warn

DESCRIPTION, SAMPLES = 270, 277  # tags of TIFF


def check_pages(path: Path) -> None:
    """Warn if a file has more than one page. Raise UserError if the first is not the image, as the functions below.

    Counting the pages reads the headers of all, which may be damaged: then a warning says so.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            pages = getattr(image, "n_frames", 1)
            tags = getattr(image, "tag_v2", {})
            require_channels(path, str(tags.get(DESCRIPTION, "")), tags.get(SAMPLES, 1))
            first = image.size
            if image.format == "TIFF":
                for page in range(1, pages):
                    image.seek(page)
                    require_largest(path, first, image.size, page + 1)
    except UserError:
        raise
    except Exception as error:  # for a damaged header Pillow raises almost any exception
        warn(f"{path}: pages after the first cannot be read ({error}); only the first page is used")
        return
    if pages > 1:
        warn_of_pages(path, pages)


def require_channels(path: Path, description: str, samples: int) -> None:
    """Raise UserError if a TIFF's description, of ImageJ or OME-XML, says that it has more channels than samples.

    Such files store each channel as a page.
    """
    imagej = re.search(r"^channels=(\d+)", description, re.MULTILINE) if description.startswith("ImageJ=") else None
    found = imagej or re.search(r'<(?:\w+:)?Pixels\b[^>]*\bSizeC="(\d+)"', description)
    if found and (channels := int(found[1])) > samples:
        raise UserError(
            f"{path} stores its {channels} channels as pages: save it as RGB, or the channel of a mask alone, "
            "for example in ImageJ by Image > Type > RGB Color"
        )


def require_largest(path: Path, first: tuple[int, int], size: tuple[int, int], page: int) -> None:
    """Raise UserError if a page, numbered from 1, is larger than the first: that is a thumbnail. Sizes: (W, H)."""
    if first[0] * first[1] < size[0] * size[1]:
        raise UserError(
            f"{path} starts with a smaller copy, {first[0]} x {first[1]} pixels, and its page {page} is "
            f"{size[0]} x {size[1]}: save the largest page as a file of its own"
        )


def warn_of_pages(path: Path, pages: int | str) -> None:
    """Warn of a file with several pages."""
    warn(f"{path} has {pages} pages, and only the first is used: save the others as separate files")
