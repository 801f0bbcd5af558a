"""Foreground probabilities of all predictors for an image of any size, in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.readers import Reader
from ..device import Precision, autocast
from ..inference.image import side_of_tiles
from ..inference.predictor import foreground
from ..inference.tiles import TILE, batch_on, in_tiles, resized
from ..model import SemiMoE


def predict_whole(
    model: SemiMoE, image: Reader, preprocessing: Preprocessing, device: torch.device, precision: Precision = "auto"
) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (H, W) on the CPU, of each predictor of `foreground` for one image.

    (H, W) is the size at which the reader reads. A squashed image is one tile, others are predicted in overlapping
    tiles, as by `predict_image`. The model is in eval mode.
    """
    names: list[str] = []

    def forward(pixels: Tensor) -> Tensor:
        with autocast(precision, device):
            output = model(augment.normalize(pixels, preprocessing.mean, preprocessing.std))
        probabilities = foreground(output, model.expert_tasks)
        names[:] = probabilities
        return torch.stack([*probabilities.values()], 1)

    background = [0.0] * (1 + len(model.expert_tasks))
    pieces = in_tiles(image, forward, background, device, side_of_tiles(image, TILE), batch_on(device))
    fields = torch.cat([piece for _, piece in pieces], 1)
    return dict(zip(names, fields, strict=True))


def at_full_size(image: Reader, field: Tensor) -> Tensor:
    """A field (1, h, w) of an image at the size (H, W) of its file, as `predict_image` resizes it -> (1, H, W)."""
    return torch.cat([rows for _, rows in resized([(0, field)], image.size, image.full_size)], 1)
