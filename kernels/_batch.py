"""Batches in parts: CUDA ends the second axis of a grid, which numbers images, at 65,535."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

IMAGES = 2**15  # of a launch, the most; a power of 2, so that the tensors of every launch are aligned as the first's


def launches(batch: int, *arguments: Any) -> Iterator[tuple[int, list[Any]]]:
    """Images of each launch, and its part of every argument: a tensor (B, ...), a sequence of such tensors, or None."""
    for first in range(0, batch, IMAGES):
        images = min(IMAGES, batch - first)
        yield images, [_part(argument, first, images) for argument in arguments]


def _part(argument: Any, first: int, images: int) -> Any:
    if isinstance(argument, Tensor):
        return argument if len(argument) == images else argument[first : first + images]
    return argument and tuple(_part(x, first, images) for x in argument)
