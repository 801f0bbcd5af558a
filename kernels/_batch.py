"""Split a batch over several launches: images are the second axis of the grid, which CUDA limits to 65,535."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

IMAGES = 2**15  # most images of a launch; a power of 2, so that the tensors of every launch have the same alignment


def launches(batch: int, *arguments: Any) -> Iterator[tuple[int, list[Any]]]:
    """For each launch: its number of images, and their slice of every argument.

    An argument is a tensor (B, ...), a sequence of such tensors (the slice is a tuple), or None.
    """
    for first in range(0, batch, IMAGES):
        images = min(IMAGES, batch - first)
        yield images, [_part(argument, first, images) for argument in arguments]


def _part(argument: Any, first: int, images: int) -> Any:
    if isinstance(argument, Tensor):
        return argument if len(argument) == images else argument[first : first + images]
    return None if argument is None else tuple(_part(x, first, images) for x in argument)
