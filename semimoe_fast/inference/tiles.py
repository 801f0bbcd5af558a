"""Predict images of any size in overlapping tiles, with memory that does not depend on the height of the image.

The fields of an image are the weighted mean of the fields of its tiles. The weights of a tile are a Gaussian window, a
product of one window for the rows and one for the columns; along each axis the windows are divided by their sum, so
that the weights at every pixel sum to 1. An image that fits into one tile has the weight 1 everywhere, and its fields
are those of the network, bit for bit.

The tiles are computed row of tiles by row of tiles. Pixels are read once, in strips as wide as the image, and a band of
fields as high as a tile collects the weighted sums. The rows of the band that no later tile covers are final and leave
it as the next piece of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.readers import Reader
from ..model import STRIDE

TILE = 1024  # default side in pixels
OVERLAP = 128  # of neighboring tiles, in pixels
PIECE = 512  # rows of a resized piece, which bounds its memory
BLOCK, BRIGHT = 8, 220  # see `is_empty`

Piece = tuple[int, Tensor]  # first row, and the fields of some rows, float32 (F, rows, W)
Forward = Callable[[Tensor], Tensor]  # uint8 (B, 3, h, w) -> fields, float32 (B, F, h, w), on one device


def batch_on(device: torch.device) -> int:
    """Tiles in one call of the network; on the CPU, more only leave the caches."""
    return 4 if device.type == "cuda" else 1


def overlap_of(tile: int) -> int:
    """Overlap of neighboring tiles in pixels: 128, about what the network sees around a pixel; less for small tiles.

    It is a multiple of 16 as the side is, so that all tiles but the last of a row or column meet the pooling windows of
    the network at the same pixels. Raises ValueError for a side that is not a positive multiple of 16.
    """
    if tile < STRIDE or tile % STRIDE:
        raise ValueError(f"the side of a tile is {tile}: give a positive multiple of {STRIDE}")
    return min(OVERLAP, tile // 4 // STRIDE * STRIDE)


def axis(length: int, tile: int) -> list[tuple[int, Tensor]]:
    """Tiles along an axis of `length` pixels: the first pixel and the weights of each, float32 (min(tile, length),).

    At every pixel the weights sum to 1. The standard deviation of the window is an eighth of the tile, so its ends have
    e^-8 of the weight of its middle and no weight is 0.
    """
    side = min(tile, length)
    starts = [*range(0, length - side, tile - overlap_of(tile)), length - side]
    window = torch.exp(-(((torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / (side / 8)) ** 2) / 2)
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += window
    return [(start, (window / total[start : start + side]).float()) for start in starts]


def is_empty(pixels: Tensor) -> bool:
    """Whether a tile, uint8 (3, H, W), shows nothing but the bright background of a slide.

    Every channel of every block of 8 x 8 pixels has a mean of at least 220. Blocks make the rule blind to noise of the
    camera and of JPEG, and any stained spot of their size counts.
    """
    blocks = functional.avg_pool2d(pixels.float(), BLOCK, ceil_mode=True)  # the last ones may be smaller
    return bool(blocks.min() >= BRIGHT)


@torch.no_grad()
def in_tiles(
    image: Reader,
    forward: Forward,
    empty: Sequence[float],
    device: torch.device,
    tile: int = TILE,
    batch: int = 1,
    skip_background: bool = False,
) -> Iterator[Piece]:
    """The fields of an image in pieces of full rows, from top to bottom and on the CPU.

    empty: the values of the F fields in tiles that `is_empty` tells; they are used with skip_background only. tile:
    side of the tiles, a multiple of 16. batch: most tiles in one call of `forward`.
    """
    height, width = image.size
    rows, columns = ([(start, w.to(device)) for start, w in axis(length, tile)] for length in (height, width))
    side = len(rows[0][1])
    band = torch.zeros(len(empty), side, width, device=device)
    strips = _strips(image, [top for top, _ in rows], side)
    for (top, down), end, strip in zip(rows, [*(top for top, _ in rows[1:]), height], strips, strict=True):
        read = torch.from_numpy(strip).permute(2, 0, 1)
        skipped = [
            skip_background and is_empty(read[..., left : left + len(across)]) for left, across in columns
        ]  # before the copy, so that a GPU does not have to answer
        pixels = read.to(device)
        cut = [(left, across, pixels[..., left : left + len(across)]) for left, across in columns]
        for left, across, fields in _fields(cut, skipped, forward, empty, batch):
            band[..., left : left + len(across)] += fields * (down[:, None] * across)
        yield top, band[:, : end - top].to("cpu", copy=True)
        band = torch.cat([band[:, end - top :], band.new_zeros(len(band), end - top, width)], 1)


def _strips(image: Reader, tops: Sequence[int], height: int) -> Iterator[np.ndarray]:
    """Rows `top` to `top + height` of an image for each top, uint8 (height, W, 3).

    Every row is read once, in a thread that works ahead by one strip.
    """
    width, ends = image.size[1], [0, *(top + height for top in tops)]
    with ThreadPoolExecutor(1) as ahead:
        reading = ahead.submit(image.read, 0, 0, height, width)
        strip = np.empty((height, width, 3), np.uint8)
        for start, end, following in zip(ends, ends[1:], [*ends[2:], None], strict=False):
            new = reading.result()
            if following is not None:
                reading = ahead.submit(image.read, end, 0, following - end, width)
            strip = np.concatenate([strip[end - start :], new])
            yield strip


def _fields(
    cut: Sequence[tuple[int, Tensor, Tensor]],
    skipped: Sequence[bool],
    forward: Forward,
    empty: Sequence[float],
    batch: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First column, weights and fields of the tiles (first column, weights, pixels) of a row; `empty` if skipped."""
    for (left, across, pixels), skip in zip(cut, skipped, strict=True):
        if skip:
            yield left, across, torch.tensor(empty, device=pixels.device)[:, None, None]
    kept = [tile for tile, skip in zip(cut, skipped, strict=True) if not skip]
    for start in range(0, len(kept), batch):
        group = kept[start : start + batch]
        fields = forward(torch.stack([pixels for _, _, pixels in group]))
        yield from ((left, across, field) for (left, across, _), field in zip(group, fields, strict=True))


def resized(pieces: Iterable[Piece], size: tuple[int, int], target: tuple[int, int]) -> Iterator[Piece]:
    """Pieces of an image of `size` (h, w) as pieces of the same image of `target` (H, W) pixels.

    Bilinear with half-pixel centers, as torch's interpolate (align_corners=False) does it with the whole image; no more
    than PIECE rows are resized at once.
    """
    if size == target:
        yield from pieces
        return
    (height, _), (rows, columns) = size, target
    position = ((torch.arange(rows, dtype=torch.float64) + 0.5) * (height / rows) - 0.5).clamp(0, height - 1)
    above = position.long()
    below = (above + 1).clamp(max=height - 1)
    share = (position - above).float()[:, None]
    held, first, done = None, 0, 0
    for _, piece in pieces:
        held = piece if held is None else torch.cat([held, piece], 1)
        end = first + held.shape[1]
        ready = int(torch.searchsorted(below, end))  # rows whose neighbors are held
        for start in range(done, ready, PIECE):
            part = slice(start, min(start + PIECE, ready))
            mixed = torch.lerp(held[:, above[part] - first], held[:, below[part] - first], share[part])
            yield start, functional.interpolate(mixed[None], (mixed.shape[1], columns), mode="bilinear")[0]
        done = ready
        needed = min(int(above[done]), end) if done < rows else end
        held, first = held[:, needed - first :], needed
