"""Foreground probabilities of a trained model's predictors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..model import Output, SemiMoE

GATED = "gated"


def gated_foreground(output: Output) -> Tensor:
    """Foreground probability (B, H, W) of the gated mask, float32."""
    return not_background(output.mask)


def foreground(output: Output, expert_tasks: Sequence[str]) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (B, H, W), of the gated mask and of each expert's own prediction, by name."""
    return {GATED: gated_foreground(output)} | own_foreground(output.own, expert_tasks)


def own_foreground(predictions: Sequence[Tensor], expert_tasks: Sequence[str]) -> dict[str, Tensor]:
    """Foreground probabilities, float32 (B, H, W), of each expert's own prediction, by name."""
    probabilities = {}
    for number, (task, own) in enumerate(zip(expert_tasks, predictions, strict=True), 1):
        name = f"{task} expert" if expert_tasks.count(task) == 1 else f"{task} expert {number}"
        probabilities[name] = (own[:, 0].float().tanh() + 1) / 2 if task == "sdf" else not_background(own)
    return probabilities


def is_boundary(name: str) -> bool:
    """Whether `foreground` gives the ring around the glands under a name, and not the glands."""
    return name.startswith("boundary")


def not_background(logits: Tensor) -> Tensor:
    """Probability (B, H, W), float32, that the class of logits (B, K, H, W) is not 0."""
    return logits.float().softmax(1)[:, 1:].sum(1)


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
