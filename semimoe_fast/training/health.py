"""Whether the experts of a run still learn.

A channel of an expert's last feature maps is dead if its ReLU is 0 at every pixel of every image: then no gradient
passes, so it hardly ever returns. An expert with many dead channels predicts little more than one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import Dataset
from ..data.ragged import Ragged
from ..device import Precision, autocast
from ..errors import warn
from ..inference.predictor import own_foreground
from ..model import SemiMoE

MOST_IMAGES = 16
MANY = 0.75  # share of dead channels that is worth a warning; up to half of them may come and go


class Health(NamedTuple):
    """For each expert: the share of dead channels, and the standard deviation of its own prediction over the pixels."""

    dead_channels: tuple[float, ...]
    spread: tuple[float, ...]  # of the foreground probability, of an sdf (sdf + 1) / 2; 0 if the prediction is constant


@torch.no_grad()
def expert_health(
    model: SemiMoE,
    images: Dataset | Ragged,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
) -> Health:
    """Health of the experts on 9 to 16 images, evenly chosen, or all if there are fewer; of images of any size, of the
    middle.

    The model is in eval mode afterwards.
    """
    model.eval()
    images = images[:: -(-len(images) // MOST_IMAGES)]
    if isinstance(images, Ragged):
        images = images.centers(preprocessing.image_size)
    alive, predictions = False, []
    for pixels in images.images.split(8):
        with autocast(precision, device):
            resized = augment.whole(pixels.to(device), preprocessing.image_size)
            normalized = augment.normalize(resized, preprocessing.mean, preprocessing.std)
            means, _, own = model.run_experts(normalized)
        alive = alive | (means != 0).any(0)  # a mean of features after ReLU is 0 only if all of them are
        predictions.append(torch.stack([*own_foreground(own, model.expert_tasks).values()]).flatten(1))
    dead = 1 - alive.float().mean(1)
    return Health(tuple(dead.tolist()), tuple(torch.cat(predictions, 1).std(1, correction=0).tolist()))


def warn_of_dead_experts(tasks: Sequence[str], health: Health, before: Health | None, epoch: int, folder: Path) -> None:
    """Warn once of every expert of which many channels are dead, but were not `before`."""
    for number, (task, dead) in enumerate(zip(tasks, health.dead_channels, strict=True)):
        if dead >= MANY and (before is None or before.dead_channels[number] < MANY):
            warn(
                f"{folder}: at epoch {epoch + 1}, {dead:.0%} of the features of the {task} expert are 0 on labeled "
                "images, where they learn no more; start a new run with a smaller --lr, such as that of --recipe strong"
            )
