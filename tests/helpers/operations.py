"""Small arguments of every public operation, for tests that call all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semimoe_fast import functional as F

ROWS = (2, 1, 2)  # of the heads of mask, sdf and boundary

Arguments = dict[str, Any]


def draw(batch: int = 2, height: int = 6, width: int = 5, channels: int = 4) -> dict[str, Arguments]:
    """The arguments of each operation by name, of the same random numbers at each call."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def classes() -> Tensor:
        return torch.randint(0, 2, (batch, height, width), generator=random)

    features = [numbers(batch, channels, height, width) for _ in range(3)]
    weights, biases = [numbers(rows, channels) for rows in ROWS], [numbers(rows) for rows in ROWS]
    gates = {"features": features, "gate_weights": numbers(batch, 3, 3), "head_weights": weights, "head_biases": biases}
    projections = {"projections": numbers(batch, 3, sum(ROWS), height, width), "gate_weights": numbers(batch, 3, 3)}
    projections["head_biases"] = biases
    own = {"own_weights": [numbers(rows, channels) for rows in ROWS], "own_biases": [numbers(rows) for rows in ROWS]}
    logits = [numbers(batch, rows, height, width) for rows in ROWS]
    targets = {"mask": classes(), "sdf": numbers(batch, height, width).tanh(), "boundary": classes()}
    predictions = dict(zip(("mask_logits", "raw_sdf", "boundary_logits"), logits, strict=True))
    dice = {"logits": logits[0], "target": targets["mask"]}
    running = {"running_mean": numbers(channels), "running_var": numbers(channels).square()}
    return {
        "squared_distance": {"mask": targets["mask"]},
        "distance_targets": {"mask": targets["mask"]},
        "multi_gate": gates,
        "pseudo_labels": gates,
        "project_experts": {"features": features, "head_weights": weights} | own,
        "mix_projections": projections,
        "label_projections": projections,
        "squared_dice_loss": dice,
        "soft_dice_loss": dice,
        "tanh_mse_loss": {"raw": logits[1], "sdf": targets["sdf"]},
        "objective_terms": predictions | targets,
        "joint_objective_terms": {"predictions": [tuple(logits)] * 2} | targets,
        "adaptive_loss": {"terms": numbers(3), "log_vars": numbers(3)},
        "batch_norm_relu": {"x": features[0], "weight": numbers(channels), "bias": numbers(channels)} | running,
        "fold_upsampling": {"weights": [numbers(3, channels, 3, 3)]},
    }


class DLPackArray:
    """An array of another library: DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **arguments: object) -> object:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class NoGradient(torch.autograd.Function):
    """A copy whose backward pass gives no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> None:
        return None


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64 on the CPU, as leaves."""
    return [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]


def call(operation: str, arguments: Arguments) -> list[Tensor]:
    """The results of an operation, and with them its changes of the running statistics."""
    copies = {
        name: tree_map(Tensor.clone, value) for name, value in arguments.items()
    }  # batch_norm_relu writes to some
    results = flat(getattr(F, operation)(**copies))
    return results + [copies[name] for name in ("running_mean", "running_var") if name in copies]


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in flat(item)]


def tree_map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`change` of each tensor in nested lists and tuples; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(tree_map(change, item) for item in value) if isinstance(value, list | tuple) else value
