"""Image folders in the GlaS layout, decoded once into uint8 tensors.

ROOT/PART/image holds the images and ROOT/PART/mask their masks, paired by stem: image/1.tif with mask/1.png. In a mask
any non-zero value is gland. Whatever is wrong with a folder or a file is a UserError that names it and the remedy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..errors import UserError, warn

A, B = TypeVar("A"), TypeVar("B")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]

# As published. (The std of GlaS is not that of its pixels, which is about (0.168, 0.248, 0.132).)
NORMALIZATION: dict[str, Statistics] = {
    "glas": ((0.787803, 0.512017, 0.784938), (0.428206, 0.507778, 0.426366)),
    "crag": ((0.83065554, 0.72236917, 0.8572969), (0.11995327, 0.15234795, 0.09136074)),
}


@dataclass
class Dataset:
    """N images of one size. They may be mapped from a file and larger than memory: read them, never write them."""

    images: Tensor  # uint8 (N, 3, S, S)
    masks: Tensor | None  # uint8 0/1 (N, S, S)
    names: list[str]  # file names without suffix

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Dataset:
        masks = None if self.masks is None else self.masks[rows]
        return Dataset(self.images[rows], masks, self.names[rows])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names and decoded content, which is read once, however often it is asked for."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))  # the bytes of the file names
        for tensor in (self.images, self.masks):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


class Pair(NamedTuple):
    """The files of one image."""

    image: Path
    mask: Path | None


def load_part(root: Path, part: str, size: int, with_masks: bool) -> Dataset:
    """Read ROOT/PART and resize it to size x size pixels; without masks a mask folder is ignored.

    Raises UserError for missing or empty folders, images without a mask or masks without an image, pairs of different
    sizes, and files that read_image or read_mask refuse.
    """
    return read_pairs(list_pairs(root, part, with_masks), size, part)


def list_pairs(root: Path, part: str, with_masks: bool) -> list[Pair]:
    """The files of ROOT/PART, sorted. Raises UserError where they do not pair, as `load_part` says."""
    images = list_images(_part_folder(root, part, "image"))
    masks = _masks_of(images, _part_folder(root, part, "mask")) if with_masks else [None] * len(images)
    return [Pair(*paths) for paths in zip(images, masks, strict=True)]


def read_pairs(pairs: Sequence[Pair], size: int, title: str) -> Dataset:
    """Decode and resize files into memory, under a progress bar. Raises UserError as `read_pair` does."""
    images, masks = zip(*in_threads(lambda pair: read_pair(pair, size), pairs, title), strict=True)
    return Dataset(
        images=torch.stack(images),
        masks=None if masks[0] is None else torch.stack(masks),
        names=[pair.image.stem for pair in pairs],
    )


def read_pair(pair: Pair, size: int) -> tuple[Tensor, Tensor | None]:
    """An image, uint8 (3, size, size), and its mask, uint8 0/1 (size, size), if it has one.

    Raises UserError where the two differ in size, and for files that read_image or read_mask refuse.
    """
    image = read_image(pair.image)
    if pair.mask is None:
        return resize_image(image, size), None
    height, width = image.shape[:2]
    mask = read_mask(pair.mask)
    if mask.shape != (height, width):
        raise UserError(
            f"{pair.image} is {width} x {height} pixels but its mask {pair.mask} is {mask.shape[1]} x "
            f"{mask.shape[0]}: give the mask the size of its image"
        )
    return resize_image(image, size), resize_mask(mask, size)


def in_threads(call: Callable[[A], B], items: Sequence[A], title: str) -> list[B]:
    """call(item) of every item, in their order, under a progress bar; the first error ends it."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(tqdm(pool.map(call, items), title, len(items), leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted; hidden files and those that are no images (Thumbs.db) are passed over.

    Raises UserError if the folder is missing or has no image, or two files of it have one stem.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: create it or correct the path")
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not paths:
        raise UserError(f"{folder} holds no image: put PNG, TIFF, BMP or JPEG files there or correct the path")
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"{other} and {path.name} have the same stem: remove or rename one, files pair by stem")
    return paths


def read_image(path: Path) -> np.ndarray:
    """Read any 8-bit image Pillow knows as RGB, uint8 (H, W, 3); gray and palette are converted, alpha is dropped.

    EXIF orientation is applied; a warning tells of pages after the first.

    Raises UserError for unreadable files and for more than 8 bits per channel.
    """
    image, deep = _decode(path)
    if deep:
        raise UserError(f"{path} has more than 8 bits per channel (mode {image.mode}): save it as 8-bit RGB")
    return np.array(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as uint8 (H, W), 1 where its value is not 0: 1-bit, 8-bit, palette (by index) or instance ids.

    Gray stored as RGB counts as one channel. Raises UserError for unreadable files, colors, float values and JPEG.
    """
    image, deep = _decode(path)
    remedy = "save it as a PNG of one channel with class or instance numbers, 0 for background"
    if image.format == "JPEG":
        raise UserError(f"{path} is a JPEG, whose compression leaves non-zero values around each gland: {remedy}")
    if image.mode == "F":
        raise UserError(f"{path} holds floating-point values: {remedy}")
    values = np.array(image)
    if values.ndim == 3:
        values = values[..., : len(image.getbands()) - ("A" in image.getbands())]  # alpha is no label
        if deep or (values != values[..., :1]).any():  # of deep colors only the high bytes have come
            raise UserError(f"{path} is a color image (mode {image.mode}): {remedy}")
        values = values[..., 0]
    return (values != 0).astype(np.uint8)


def resize_image(image: np.ndarray, size: int) -> Tensor:
    """Resize an image, uint8 (H, W, 3), to uint8 (3, size, size), bilinearly: half-pixel centers, no antialiasing.

    This is OpenCV's INTER_LINEAR, which the published results were made with, up to its 11-bit weights (1 of 255).
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    if pixels.shape[1:] == (size, size):
        return pixels
    resized = functional.interpolate(pixels[None].float(), (size, size), mode="bilinear", align_corners=False)
    return resized[0].round().to(torch.uint8)


def resize_mask(mask: np.ndarray, size: int) -> Tensor:
    """Resize a mask (H, W) to (size, size) by nearest neighbor, index floor(i * H / size): OpenCV's INTER_NEAREST."""
    row, column = (np.arange(size) * side // size for side in mask.shape)
    return torch.from_numpy(mask[row[:, None], column])


def channel_statistics(*sets: Tensor) -> Statistics:
    """Mean and std of each channel of all images, uint8 sets (N, C, H, W), pixels scaled to [0, 1].

    A std is at least one gray level, so that a constant channel can be divided by it. Raises ValueError for no pixels.
    """
    if not any(images.numel() for images in sets):
        raise ValueError(f"no pixels to measure in images of shape {', '.join(str(tuple(s.shape)) for s in sets)}")
    counts = torch.zeros(sets[0].shape[1], 256, dtype=torch.int64)
    for images in sets:
        for some in images.split(64):  # the sets may be larger than memory
            counts += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in some.unbind(1)]).cpu()
    level = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * level).sum()
        means.append(mean.item())
        stds.append(max((share * (level - mean).square()).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def _part_folder(root: Path, part: str, kind: str) -> Path:
    """ROOT/PART/KIND, with a UserError that says what ROOT does have where it is missing."""
    folder = root / part / kind
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: correct the path of the data")
    if not folder.is_dir():
        parts = sorted(path.parent.name for path in root.glob(f"*/{kind}") if path.is_dir())
        choice = f"choose one of its parts {', '.join(parts)}" if parts else f"{root} has no PART/{kind} at all"
        raise UserError(f"{folder} is missing: {choice}")
    return folder


def _masks_of(images: list[Path], folder: Path) -> list[Path]:
    """The mask of each image, by stem."""
    masks = {path.stem: path for path in list_images(folder)}
    for image in images:
        if image.stem not in masks:
            raise UserError(f"{image} has no mask: add {folder / image.stem}.png or remove the image")
    spare = sorted(masks.keys() - {image.stem for image in images})
    if spare:
        raise UserError(f"{masks[spare[0]]} has no image: add {images[0].parent / spare[0]}.png or remove the mask")
    return [masks[image.stem] for image in images]


def _decode(path: Path) -> tuple[Image.Image, bool]:
    """The file's image, decoded to the last pixel and upright, and whether the file has more than 8 bits per channel.

    Of several pages the first is taken, which a warning says.
    """
    try:
        # From an open file, because Pillow maps a named one, and then scrambles gray TIFFs that lie on their side.
        with path.open("rb") as file, Image.open(file) as image:
            pages = getattr(image, "n_frames", 1)
            # Pillow cuts 16-bit colors to 8 without a word; only the decoder's raw mode, such as RGB;16B, tells.
            # BGR;16 is another thing: 16 bits per pixel.
            raw_modes = str([tile[3] for tile in image.tile]).replace("BGR;16", "")
            image.load()
            _turn_upright(image, path)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} cannot be read as an image (unknown or damaged header): replace or remove it"
        ) from error
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    if pages > 1:
        warn(f"{path} has {pages} pages, of which the first alone is read: save the others as files of their own")
    return image, image.mode[0] in "IF" or ";16" in raw_modes


def _turn_upright(image: Image.Image, path: Path) -> None:
    """Apply the EXIF orientation, as viewers and annotation tools do."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow raises almost anything, and the pixels are whole
        warn(f"{path}: its EXIF data cannot be read ({error}); it is taken to be upright")
