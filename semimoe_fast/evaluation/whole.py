"""Foreground probabilities of an image at its own size, of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import augment
from ..device import Precision, autocast
from ..inference.predictor import foreground
from ..model import SemiMoE

TILE = 1024  # side in pixels from which on an image is cut into tiles


@torch.no_grad()
def predict_whole(
    model: SemiMoE, image: Tensor, preprocessing: Preprocessing, device: torch.device, precision: Precision = "auto"
) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (H, W) on the device, of each predictor of `foreground` for one image.

    image: uint8 (H, W, 3). It is cut into tiles of at most TILE x TILE pixels that do not overlap. The model is in eval
    mode.
    """
    height, width = image.shape[:2]
    found: dict[str, Tensor] = {}
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            pixels = image[top : top + TILE, left : left + TILE].permute(2, 0, 1)[None].to(device)
            with autocast(precision, device):
                output = model(augment.normalize(pixels, preprocessing.mean, preprocessing.std))
            for name, probability in foreground(output, model.expert_tasks).items():
                whole = found.setdefault(name, probability.new_empty(height, width))
                whole[top : top + TILE, left : left + TILE] = probability[0]
    return found
