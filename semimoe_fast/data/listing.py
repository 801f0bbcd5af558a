"""The image files of a folder, and how those of two folders pair."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image

from ..errors import UserError
from .layout import listed
from .slides import each_once, named_by_indexes

WINDOWS_FILES = "thumbs.db", "desktop.ini"


def list_images(folder: Path, kinds: str = "PNG, TIFF, BMP or JPEG", also: Collection[str] = frozenset()) -> list[Path]:
    """The image files of a folder, sorted by path. Hidden files and other files, such as Thumbs.db, are skipped.

    kinds: the files that the message for an empty folder recommends. also: suffixes beside those of Pillow, such as
    those of slides; a slide of several files is listed once, as `slides.each_once` says. Raises UserError if the
    folder is missing, has no image, two images with the same stem, or an image name that is not a regular file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: correct the path")
    suffixes = _suffixes() | set(also)
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    paths = each_once(paths)
    if not paths:
        below = next((path.parent for path in folder.glob("*/*") if path.suffix.lower() in suffixes), None)
        within = f" itself, and folders within it, such as {below}, are not searched" if below else ""
        others = _others(folder, suffixes)
        within += f" (it has {listed(others)})" if others else ""
        raise UserError(f"{folder} holds no image{within}: put {kinds} files there or correct the path")
    by_stem: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():  # reading a named pipe would wait forever
            raise UserError(f"{path} is not a file but a {_kind(path)}: remove or rename it")
        other = by_stem.setdefault(_stem(path), path)
        if other != path:
            composed = "" if other.stem == path.stem else " but for how letters are composed"
            raise UserError(
                f"{other} and {path.name} have the same stem{composed}: remove or rename one, files pair and results "
                "are named by stem"
            )
    return paths


def note_of_others(folder: Path, also: Collection[str] = frozenset()) -> str | None:
    """One line if a folder has files that `list_images` leaves out because of their suffixes; None if it has none."""
    if not (others := _others(folder, _suffixes() | set(also))):
        return None
    return f"{folder}: left out, as their names do not end as those of images ({len(others)}): {listed(others)}"


def _others(folder: Path, suffixes: Collection[str]) -> list[str]:
    """The names of the files of other suffixes, without hidden ones, those of Windows, and parts of slides."""
    paths = list(folder.iterdir())
    named = named_by_indexes(paths)
    others = (path for path in paths if path.suffix.lower() not in suffixes and path.name not in named)
    visible = (path for path in others if path.name[0] != "." and path.name.lower() not in WINDOWS_FILES)
    return sorted(path.name for path in visible if path.is_file())


def _suffixes() -> set[str]:
    """The suffixes of the formats that Pillow reads."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _stem(path: Path) -> str:
    """The stem by which files pair. macOS composes letters such as é of two characters, other systems of one."""
    return unicodedata.normalize("NFC", path.stem)


def _kind(path: Path) -> str:
    kinds = {"folder": path.is_dir(), "broken link": not path.exists(), "named pipe": path.is_fifo()}
    return next((kind for kind, applies in kinds.items() if applies), "device or a socket")


def match(images: Sequence[Path], folder: Path, kind: str, otherwise: str = "remove the image") -> list[Path]:
    """The file of each image, by stem, in a folder of masks or of another `kind`.

    otherwise: what to do about a missing file, apart from adding it. Raises UserError for missing and surplus files.
    """
    files = {_stem(path): path for path in list_images(folder, "PNG or TIFF")}
    stems = [_stem(image) for image in images]
    surplus = sorted(files.keys() - set(stems))
    for image, stem in zip(images, stems, strict=True):
        if stem not in files:
            near = next((other for other in surplus if re.match(f"{re.escape(stem)}[^0-9A-Za-z]", other)), None)
            remedy = f"add {folder / image.stem}.png"
            if near is not None:
                remedy = f"rename {files[near].name} to {image.stem}{files[near].suffix}"
            raise UserError(f"{image} has no {kind}: {remedy}, or {otherwise}")
    if surplus:
        stem = surplus[0]
        raise UserError(f"{files[stem]} has no image: add {images[0].parent / stem}.png or remove the {kind}")
    return [files[stem] for stem in stems]
