"""The backend that the caller asks for: `backend(...)` first, then the environment variable SEMIMOE_BACKEND."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from ..errors import UserError

BACKENDS = ("reference", "portable", "fused")

_context: ContextVar[str | None] = ContextVar("semimoe_fast_backend", default=None)


class BackendError(UserError, RuntimeError):
    """The backend that the caller asks for does not exist or cannot serve here."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend "reference", "portable" or "fused" for all operations in a `with` block.

    It overrides SEMIMOE_BACKEND and applies to the current thread or asyncio task only. Blocks can be nested. With
    torch.compile, put the block around the first call of the compiled function: tracing reads the backend once, and
    later calls keep it. Raises BackendError for other names; an operation raises it where the backend cannot serve.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend({name!r}): choose one of {', '.join(BACKENDS)}")
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def forced_backend() -> str | None:
    """The backend that the caller asks for, or None."""
    return _context_backend() or os.environ.get("SEMIMOE_BACKEND") or None


@torch.compiler.assume_constant_result  # torch.compile cannot trace ContextVar.get
def _context_backend() -> str | None:
    return _context.get()
