"""The backward pass of the custom ops that compute gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def first_alone(operation: str, backend: str) -> Callable[..., NoReturn]:
    """A backward pass for `register_autograd` that refuses, and names the backend that has second derivatives."""

    def refuse(ctx: Any, *_: object) -> NoReturn:
        raise RuntimeError(f"{operation} has first derivatives only: for second ones set SEMIMOE_BACKEND={backend}")

    return refuse
