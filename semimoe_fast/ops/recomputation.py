"""Tensors that the backward pass computes again, bit for bit, instead of keeping them from the forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """A tensor as function(*inputs); an input may be a recipe itself."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | Recipe, ...]


Recipes = WeakTensorKeyDictionary  # by the tensors that they give

_recipes: ContextVar[Recipes | None] = ContextVar("semimoe_fast_recipes", default=None)


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    """Keep recipes for the backward pass instead of the tensors that `remember` knows, in a `with` block.

    Only the forward pass has to be in the block, which applies to the current thread. Saved tensors and the inputs of
    recipes must not change before the backward pass: autograd does not notice it here.
    """
    recipes = Recipes()
    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pack(tensor, recipes), unpack):
            yield
    finally:
        _recipes.reset(token)


def remember(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `result`, which function(*inputs) gives again bit for bit; under `recompute` its recipe is known then."""
    if not torch.compiler.is_compiling() and (recipes := _recipes.get()) is not None:
        recipes[result] = Recipe(function, tuple(pack(tensor, recipes) for tensor in inputs))
    return result


def pack(tensor: Tensor, recipes: Recipes) -> Tensor | Recipe:
    """What autograd keeps for a tensor: its recipe, if there is one, else its values without their history."""
    return recipes.get(tensor) or tensor.detach()


def unpack(packed: Tensor | Recipe) -> Tensor:
    """The tensor for which `pack` has kept this."""
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed.function(*map(unpack, packed.inputs))
