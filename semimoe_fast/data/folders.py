"""Read image folders in the GlaS layout into uint8 tensors.

ROOT/PART/image holds the images and ROOT/PART/mask their masks, paired by stem: image/1.tif with mask/1.png. Every
non-zero mask value is gland; in an instance map it is the id of a gland. Bad folders and files raise UserError, which
names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..errors import UserError, first_sentence, warn
from .components import split_mask
from .layout import part_folder
from .listing import list_images, match
from .mask_values import stored_values
from .misread import refuse_misread
from .pages import check_pages

BITS_PER_SAMPLE = 258  # a tag of TIFF
LARGE = 2**24  # pixels of an image that is decoded while no other large one is
MOST_IDS = 2**16 - 1  # an image with more values, such as a depth map, is no instance map

_one_at_a_time = Lock()

A, B = TypeVar("A"), TypeVar("B")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]

# The values of the published code. (The std of the pixels of GlaS is in fact about (0.168, 0.248, 0.132).)
NORMALIZATION: dict[str, Statistics] = {
    "glas": ((0.787803, 0.512017, 0.784938), (0.428206, 0.507778, 0.426366)),
    "crag": ((0.83065554, 0.72236917, 0.8572969), (0.11995327, 0.15234795, 0.09136074)),
}


@dataclass
class Dataset:
    """N images of one size. The tensors may be mapped from a file larger than memory, so do not write to them."""

    images: Tensor  # uint8 (N, 3, S, S)
    masks: Tensor | None  # (N, S, S), uint8 0/1 or int32 ids of instances, 0 is background
    names: list[str]  # file names without suffix

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Dataset:
        masks = None if self.masks is None else self.masks[rows]
        return Dataset(self.images[rows], masks, self.names[rows])

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + (0 if self.masks is None else self.masks.nbytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and pixels; computed once, because it reads all pixels."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))  # file names as their bytes
        for tensor in (self.images, self.masks):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


class Pair(NamedTuple):
    """The files of one image."""

    image: Path
    mask: Path | None


def load_part(
    root: Path, part: str, size: int, with_masks: bool, instances: bool = False, antialias: bool = False
) -> Dataset:
    """Read ROOT/PART and resize it to size x size pixels. with_masks False ignores the mask folder.

    instances: read masks as instance maps, by `read_instances` instead of `read_mask`. antialias: as `resize_image`.
    Raises UserError for missing or empty folders, images without a mask, masks without an image, masks that differ in
    size from their image, and files that the readers refuse.
    """
    return read_pairs(list_pairs(root, part, with_masks), size, part, instances, antialias)


def list_pairs(root: Path, part: str, with_masks: bool) -> list[Pair]:
    """The files of ROOT/PART, sorted by path. Raises UserError for missing or empty folders and unpaired files."""
    images = list_images(part_folder(root, part, "image"))
    masks = match(images, part_folder(root, part, "mask"), "mask") if with_masks else [None] * len(images)
    return [Pair(*paths) for paths in zip(images, masks, strict=True)]


def read_pairs(
    pairs: Sequence[Pair], size: int, title: str, instances: bool = False, antialias: bool = False
) -> Dataset:
    """Decode and resize files in memory and show a progress bar. Raises UserError as `read_pair` does."""
    decoded = in_threads(lambda pair: read_pair(pair, size, instances, antialias), pairs, title)
    images, masks = zip(*decoded, strict=True)
    return Dataset(
        images=torch.stack(images),
        masks=None if masks[0] is None else torch.stack(masks),
        names=[pair.image.stem for pair in pairs],
    )


def read_pair(pair: Pair, size: int, instances: bool = False, antialias: bool = False) -> tuple[Tensor, Tensor | None]:
    """The resized image, uint8 (3, size, size), and its mask (size, size), or None without a mask file.

    The mask is uint8 0/1, or int32 ids with `instances`. Threads decode large images one after another, so that
    memory holds one of them. Raises UserError as `read_whole` does.
    """
    with alone_if_large(pair.image):
        image, mask = read_whole(pair, instances)
        return resize_image(image, size, antialias), None if mask is None else resize_mask(mask, size)


def alone_if_large(path: Path) -> AbstractContextManager[Any]:
    """A block in which a thread decodes a large image while no other thread does; small images have company."""
    try:
        height, width = read_header(path)
    except UserError:  # decoding raises the clear error
        return nullcontext()
    return _one_at_a_time if height * width > LARGE else nullcontext()


def read_whole(pair: Pair, instances: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """The image as it is, uint8 (H, W, 3), and its mask (H, W), uint8 0/1, int32 ids, or None without a mask file.

    Raises UserError if their files differ in size, and for files that `read_image`, `read_mask` or `read_instances`
    refuse.
    """
    image = read_image(pair.image)
    if pair.mask is None:
        return image, None
    mask = read_instances(pair.mask) if instances else read_mask(pair.mask)
    require_size(pair.mask, mask, pair.image, image.shape[:2])
    return image, mask


def require_size(path: Path, labels: np.ndarray, image_path: Path, size: tuple[int, int]) -> None:
    """Raise UserError if labels do not have the size (H, W) of their image."""
    (height, width), (rows, columns) = size, labels.shape
    if (height, width) != (rows, columns):
        raise UserError(
            f"{image_path} is {width} x {height} pixels but {path} is {columns} x {rows}: give it the size of its image"
        )


def in_threads(call: Callable[[A], B], items: Sequence[A], title: str) -> list[B]:
    """[call(item) for item in items], computed in threads with a progress bar. The first error cancels the rest."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(tqdm(pool.map(call, items), title, len(items), leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def read_image(path: Path) -> np.ndarray:
    """Read an 8-bit image of any format of Pillow as RGB, uint8 (H, W, 3).

    Gray and palette images are converted, alpha is dropped, EXIF orientation is applied. Of several pages the first
    is read, with a warning. Raises UserError for unreadable files and for more than 8 bits per channel.
    """
    image, deep = _decode(path)
    if deep:
        raise too_deep(path, f"mode {image.mode}")
    if image.mode == "La":  # gray times alpha, which Pillow does not convert to RGB
        image = image.convert("LA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def too_deep(path: Path, depth: str) -> UserError:
    """The error of an image file with more than 8 bits per channel."""
    return UserError(f"{path} has more than 8 bits per channel ({depth}): save it as 8-bit RGB")


def unreadable(path: Path) -> UserError:
    """The error of a file without permission to read it."""
    return UserError(f"{path}: you may not read it; change its permissions")


def read_header(path: Path) -> tuple[int, int]:
    """Height and width of an image file of any format of Pillow, without its EXIF orientation.

    Raises UserError if Pillow cannot read it.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except PermissionError as error:
        raise unreadable(path) from error
    except Exception as error:  # for a damaged file Pillow's decoders raise almost any exception
        raise UserError(f"{path} cannot be read as an image ({first_sentence(error)}): replace or remove it") from error


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as uint8 (H, W), 1 where the value that `read_labels` reads is not 0. Raises UserError as it does."""
    return (read_labels(path) != 0).astype(np.uint8)


def read_labels(path: Path) -> np.ndarray:
    """Read the stored values of a mask, of a palette image the indices: (H, W) of an integer dtype; bool if 1-bit.

    The file may have any integer type, and RGB with three equal channels. Raises UserError for unreadable files, other
    color images, floating-point values, lossy compression such as JPEG, and where it is unclear what is foreground:
    white for 0, values in the alpha channel.
    """
    return stored_values(path, *_decode(path))


def read_instances(path: Path) -> np.ndarray:
    """Read a mask as an instance map, int32 (H, W): 0 is background, every other value the id of an instance.

    The ids are those of the file. A file whose foreground has one value alone is a mask, and is split into its
    8-connected components. Raises UserError as `read_labels`, and for negative or more than 65,535 ids.
    """
    labels = read_labels(path)
    ids = np.unique(labels[labels != 0])
    if ids.min(initial=0) < 0:
        raise UserError(
            f"{path} has the id {ids.min()}: number the instances from 1, and set background and ignored pixels to 0"
        )
    if len(ids) > MOST_IDS:
        raise UserError(
            f"{path} has {len(ids)} different values, more than the {MOST_IDS} ids of an instance map: "
            "threshold it if it holds gray values or depths, or cut the image into tiles"
        )
    return split_mask(labels, ids).astype(np.int32)


def resize_image(image: np.ndarray | Tensor, size: int, antialias: bool = False) -> Tensor:
    """Resize an image, uint8 (H, W, 3), to uint8 (3, size, size) on its device: bilinear, half-pixel centers.

    antialias: shrink by a triangle filter as wide as two output pixels, as `readers.open_image` does, instead of
    reading the two input pixels next to each center. The published results used OpenCV's INTER_LINEAR, which has no
    antialiasing; it rounds its weights to 11 bits, so values differ by at most 1.
    """
    pixels = torch.as_tensor(image).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels.contiguous()
    options = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    resized = [  # one by one, because a large image has four times as many bytes in float32
        functional.interpolate(channel.float()[None, None], (size, size), **options)[0, 0] for channel in pixels
    ]
    return torch.stack(resized).round().to(torch.uint8)


def resize_mask(mask: np.ndarray, size: int) -> Tensor:
    """Resize a mask or instance map (H, W) to (size, size) as OpenCV's INTER_NEAREST does.

    Row i is row floor(i * H / size), so the values stay as they are.
    """
    row, column = (np.arange(size) * side // size for side in mask.shape)
    return torch.from_numpy(mask[row[:, None], column])


def channel_statistics(*sets: Tensor) -> Statistics:
    """Mean and std of each channel over all images of several sets, uint8 (N, C, ...); pixels are scaled to [0, 1].

    The std is at least 1/255, because images are divided by it. Raises ValueError if there are no pixels.
    """
    if not any(images.numel() for images in sets):
        raise ValueError(f"there are no pixels in images of shape {', '.join(str(tuple(s.shape)) for s in sets)}")
    counts = torch.zeros(sets[0].shape[1], 256, dtype=torch.int64)
    for images in sets:
        rows = max(1, 2**24 // max(1, math.prod(images.shape[1:])))
        for chunk in images.split(rows):  # a set may be larger than memory
            counts += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in chunk.unbind(1)]).cpu()
    level = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * level).sum()
        means.append(mean.item())
        stds.append(max((share * (level - mean).square()).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def _decode(path: Path) -> tuple[Image.Image, bool]:
    """Decode the first page of a file, apply the EXIF orientation, and say if it has more than 8 bits per channel.

    Further pages cause a warning. Raises UserError if Pillow cannot decode the first page, or it is not the image.
    """
    try:
        # Pass an open file: Pillow maps a named file to memory, and then scrambles rotated gray TIFFs.
        with path.open("rb") as file, Image.open(file) as image:
            # Pillow silently reduces 16-bit colors to 8 bits. Only the decoder's raw mode, such as RGB;16B, shows it.
            # BGR;16 means 16 bits per pixel, not per channel. Of a PPM, the largest value beside the raw mode shows it.
            raw_modes = str([tile[3] for tile in image.tile]).replace("BGR;16", "")
            largest = [tile[3][1] for tile in image.tile if tile[0].startswith("ppm") and isinstance(tile[3], tuple)]
            bits = max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,)))  # of a TIFF with separate planes
            refuse_misread(path, file, image)
            image.load()
            _turn_upright(image, path)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} cannot be read as an image (unknown or damaged header): replace or remove it"
        ) from error
    except UserError:
        raise
    except PermissionError as error:
        raise unreadable(path) from error
    except Exception as error:  # for a damaged file Pillow's decoders raise almost any exception
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    check_pages(path)
    return image, image.mode[0] in "IF" or ";16" in raw_modes or bits > 8 or max(largest, default=0) > 255


def _turn_upright(image: Image.Image, path: Path) -> None:
    """Apply the EXIF orientation, as viewers and annotation tools do."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # for damaged EXIF data Pillow raises almost any exception; the pixels are complete
        warn(f"{path}: its EXIF data cannot be read ({error}); its orientation is ignored")
