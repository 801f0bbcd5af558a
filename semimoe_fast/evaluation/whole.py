"""Foreground probabilities of all predictors for an image at its own size, in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.readers import ArrayReader
from ..device import Precision, autocast
from ..inference.predictor import foreground
from ..inference.tiles import in_tiles
from ..model import SemiMoE


def predict_whole(
    model: SemiMoE, image: Tensor, preprocessing: Preprocessing, device: torch.device, precision: Precision = "auto"
) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (H, W) on the CPU, of each predictor of `foreground` for one image.

    image: uint8 (H, W, 3) on the CPU, predicted at its own scale in overlapping tiles. The model is in eval mode.
    """
    names: list[str] = []

    def forward(pixels: Tensor) -> Tensor:
        with autocast(precision, device):
            output = model(augment.normalize(pixels, preprocessing.mean, preprocessing.std))
        probabilities = foreground(output, model.expert_tasks)
        names[:] = probabilities
        return torch.stack([*probabilities.values()], 1)

    background = [0.0] * (1 + len(model.expert_tasks))
    pieces = in_tiles(ArrayReader(image.numpy()), forward, background, device, batch=8 if device.type == "cuda" else 1)
    fields = torch.cat([piece for _, piece in pieces], 1)
    return dict(zip(names, fields, strict=True))
