"""The tensors of a checkpoint that resume a run: lookup by name prefix, and a check before they are restored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHECKED = ("model.", "adaptive.", "average.", "optim.")  # prefixes under which a run knows every name


class StateMismatch(Exception):
    """The tensors of a checkpoint do not fit the run; the message names the first that does not."""


def check_state(state: Mapping[str, Tensor], required: Mapping[str, Tensor]) -> None:
    """Raise StateMismatch unless `state` has the required tensors, and no unknown ones under the prefixes CHECKED.

    required: name -> tensor with the shape and dtype that the tensor of this name in `state` must have.
    """
    for name in required:
        if name not in state:
            raise StateMismatch(f"{name} is missing")
    for name, value in state.items():
        expected = required.get(name)
        if expected is None and name.startswith(CHECKED):
            raise StateMismatch(f"{name} is unknown")
        if expected is not None and (value.shape, value.dtype) != (expected.shape, expected.dtype):
            raise StateMismatch(f"{name} is {_described(value)}, not {_described(expected)}")


def states_of_ranks(state: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The own tensors of each rank that saved the state, in rank order, under the names of rank 0."""
    ranks = [state]
    while rank := with_prefix(state, f"rank{len(ranks)}."):
        ranks.append(rank)
    return ranks


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix; the names lose the prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """An optimizer's tensor on the device of its parameter; moments also get the memory layout of the parameter."""
    return value.to(parameter.device) if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
