"""Foreground probabilities of a trained model's predictors, at the training size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import resize_image
from ..device import Precision, autocast
from ..errors import UserError
from ..model import Output, SemiMoE

GATED = "gated"


def gated_foreground(output: Output) -> Tensor:
    """Foreground probability (B, H, W) of the gated mask, float32."""
    return not_background(output.mask)


def foreground(output: Output, expert_tasks: Sequence[str]) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (B, H, W), of the gated mask and of each expert's own prediction, by name."""
    probabilities = {GATED: gated_foreground(output)}
    for number, (task, own) in enumerate(zip(expert_tasks, output.own, strict=True), 1):
        name = f"{task} expert" if expert_tasks.count(task) == 1 else f"{task} expert {number}"
        probabilities[name] = (own[:, 0].float().tanh() + 1) / 2 if task == "sdf" else not_background(own)
    return probabilities


def is_boundary(name: str) -> bool:
    """Whether `foreground` gives the ring around the glands under a name, and not the glands."""
    return name.startswith("boundary")


def not_background(logits: Tensor) -> Tensor:
    """Probability (B, H, W), float32, that the class of logits (B, K, H, W) is not 0."""
    return logits.float().softmax(1)[:, 1:].sum(1)


@torch.no_grad()
def predict(
    model: SemiMoE, image: np.ndarray, preprocessing: Preprocessing, device: torch.device, precision: Precision = "auto"
) -> Output:
    """Output of the model for one image, uint8 (H, W, 3), at the training size of the model; B = 1."""
    pixels = resize_image(image, preprocessing.image_size, preprocessing.antialias)[None].to(device)
    with autocast(precision, device):
        return model(augment.normalize(pixels, preprocessing.mean, preprocessing.std))


def resize_field(field: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, h, w) bilinearly to the size (H, W) of an image -> (B, H, W)."""
    return torch.nn.functional.interpolate(field[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def require_mask(path: Path, model: SemiMoE) -> None:
    """Raise UserError for a checkpoint without a mask expert or for images that are not RGB."""
    if model.in_channels != 3:
        raise UserError(
            f"{path}: takes images of {model.in_channels} channels, not RGB; give a checkpoint of a training run"
        )
    if "mask" not in model.tasks:
        raise UserError(
            f"{path}: its experts learn {', '.join(model.tasks)}, no mask; give a checkpoint with a mask expert"
        )
