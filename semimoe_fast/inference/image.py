"""Predict one image of any size, at the scale at which the model works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import MOST_PIXELS, Preprocessing
from ..data import augment
from ..data.folders import resize_image
from ..data.readers import SLIDES, ArrayReader, Reader, at_scale, open_levels
from ..device import Precision, autocast
from ..errors import UserError
from ..model import STRIDE, SemiMoE
from .folding import folded
from .predictor import not_background
from .tiles import TILE, Forward, batch_on, in_tiles, resized

Field = Literal["probability", "sdf", "boundary"]

TASK = {"probability": "mask", "sdf": "sdf", "boundary": "boundary"}  # the gated prediction behind each field
EMPTY = {"probability": 0.0, "sdf": -1.0, "boundary": 0.0}  # values on the background of a slide
STRETCHED = 1.5  # ratio of scales from which a squashed image is far from the training images
ENLARGED, ELONGATED = 2.0, 1.6  # the same in training squares and in sides, where the training scale is not known


class Fields(NamedTuple):
    """Predictions for some rows of an image, float32 (rows, W) on the CPU; None if not asked for."""

    probability: Tensor  # of the foreground, in [0, 1]
    sdf: Tensor | None = None  # signed distance field, in [-1, 1], positive inside
    boundary: Tensor | None = None  # probability of the ring around the glands, in [0, 1]


class Squashed(ArrayReader):
    """A whole image as a square of a model's image size; it is predicted as one tile."""

    def __init__(self, image: Reader, preprocessing: Preprocessing) -> None:
        pixels = np.require(image.read(0, 0, *image.size), requirements=["C", "W"])  # PyTorch takes no mirrored arrays
        square = resize_image(torch.from_numpy(pixels), preprocessing.image_size, preprocessing.antialias)
        mpp = None if image.mpp is None else image.mpp * image.size[0] / preprocessing.image_size
        super().__init__(square.permute(1, 2, 0).numpy(), image.path, mpp)
        self.full_size = image.full_size


def predict_image(
    model: SemiMoE,
    image: Reader | np.ndarray,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    *,
    fields: Sequence[Field] = ("probability",),
    tile: int = TILE,
    tta: bool = False,
    skip_background: bool = False,
    precision: Precision = "auto",
) -> Iterator[tuple[int, Fields]]:
    """Predict an image in pieces of full rows, from top to bottom: (first row, fields of some rows).

    All pieces together are the fields of the image at its full size, whatever the scale at which the model works. The
    memory does not depend on the height of an image that the reader reads by region.

    image: from `open_for`, or any other reader, which is predicted at the scale at which it reads; uint8 pixels
    (H, W, 3) go through `open_for`. device: that of the model. fields: what to predict, "probability" and any of "sdf"
    and "boundary"; the parts of the model for the others are not computed. tile: side of the tiles in pixels of the
    model, a multiple of 16. tta: average over the eight flips and rotations of each tile.
    skip_background: tiles that `tiles.is_empty` tells are not computed, they have probability 0, sdf -1 and boundary 0.
    Raises ValueError for other tiles, and for fields without probability or without an expert; the reader raises
    UserError for a damaged file.
    """
    if "probability" not in fields:
        raise ValueError(f"fields are {tuple(fields)}: probability is always one of them")
    if not isinstance(image, Reader):
        image = open_for(image, preprocessing)
    device = torch.device(device)
    forward = _forward(model, fields, preprocessing, device, precision)
    forward = eightfold(forward) if tta else forward
    empty = [EMPTY[name] for name in fields]
    pieces = in_tiles(image, forward, empty, device, side_of_tiles(image, tile), batch_on(device), skip_background)
    for row, values in resized(pieces, image.size, image.full_size):
        yield row, Fields(**dict(zip(fields, values, strict=True)))


def side_of_tiles(image: Reader, tile: int) -> int:
    """Side of the tiles in which an image is predicted, in pixels: `tile`, but a squashed image is one tile."""
    return -(-max(image.size) // STRIDE) * STRIDE if isinstance(image, Squashed) else tile


def open_for(
    image: str | Path | np.ndarray, preprocessing: Preprocessing, scale: float | None = None, mpp: float | None = None
) -> Reader:
    """Open a file, or uint8 pixels (H, W, 3), at the scale at which a model works.

    scale: pixels of the model per pixel of the image. mpp: microns per pixel of the model. If both are None, a model of
    crops works at the microns per pixel of its training images if file and checkpoint tell them, else at the scale of
    the image; for a model of resized images the image is squashed as a whole to their square, and `note` says if that
    makes it very different from the training images. `full_size` is the image's own size. Raises UserError for files
    that cannot be read, and for those too large to be squashed.
    """
    levels = [ArrayReader(image)] if isinstance(image, np.ndarray) else open_levels(Path(image))
    full = levels[0]
    if scale is None and mpp is None:
        if preprocessing.sampling == "resize":
            with full:
                return _squashed(full, preprocessing)
        mpp = None if full.mpp is None else preprocessing.mpp
    elif mpp is not None and full.path is None:
        raise ValueError("pixels in memory have no microns per pixel: give scale")
    return at_scale(levels, scale, mpp)


def is_slide(path: Path | None) -> bool:
    """Whether a file has a format of whole slides, by its name."""
    return path is not None and path.suffix.lower() in SLIDES


def _squashed(image: Reader, preprocessing: Preprocessing) -> Squashed:
    name, (height, width) = image.path or "the image", image.full_size
    if max(height, width) > MOST_PIXELS or is_slide(image.path):
        raise UserError(
            f"{name} is {width} x {height} pixels, too large to be squashed to the training square of "
            "the checkpoint: give --scale (pixels of the model per pixel of the image) or --mpp, to predict it in tiles"
        )
    squashed = Squashed(image, preprocessing)
    squashed.note = mismatch(image, preprocessing)
    return squashed


def mismatch(image: Reader, preprocessing: Preprocessing) -> str | None:
    """One line if an image is far larger, smaller or longer than the images that a model was trained on, else None."""
    (height, width), square, scale = image.full_size, preprocessing.image_size, preprocessing.scale
    if scale is None:
        far = max(height, width) > ENLARGED * square or max(height / width, width / height) > ELONGATED
        about, remedy = "", "pixels of the model per pixel of the file"
    else:
        ratios = [side * scale / square for side in (height, width)]
        far = max(*ratios, *(1 / ratio for ratio in ratios)) > STRETCHED
        about, remedy = f", whose training images were resized by {scale:.3g}", "their scale"
    if not far:
        return None
    given = "--scale" if scale is None else f"--scale {scale:.3g}"
    return (
        f"{image.path or 'the image'} is {width} x {height} pixels and resized to the {square} x {square} of the "
        f"checkpoint{about}: if it shows more or less tissue than a training image, give {given}, {remedy}"
    )


def _forward(
    model: SemiMoE, fields: Sequence[Field], preprocessing: Preprocessing, device: torch.device, precision: Precision
) -> Forward:
    tasks = [TASK[name] for name in fields]
    model = folded(model, tasks)

    def forward(pixels: Tensor) -> Tensor:
        with autocast(precision, device):
            images = augment.normalize(pixels, preprocessing.mean, preprocessing.std)
            *gated, _ = model.gating([expert.features(images) for expert in model.experts])
        return torch.stack(
            [
                x[:, 0].float().tanh() if task == "sdf" else not_background(x)
                for task, x in zip(tasks, gated, strict=True)
            ],
            1,
        )

    return forward


def eightfold(forward: Forward) -> Forward:
    """The mean of `forward` over the eight flips and rotations of its pixels; the fields are turned back."""

    def mean(pixels: Tensor) -> Tensor:
        total = torch.zeros(())
        for turns in range(4):
            turned = pixels.rot90(turns, (2, 3))
            both = forward(turned) + forward(turned.flip(3)).flip(3)
            total = total + both.rot90(-turns, (2, 3))
        return total / 8

    return mean
