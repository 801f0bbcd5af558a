"""Fixtures of the tests of operations: the CPU kernels of each instruction set, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from semimoe_fast.ops import _native


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled module computes with it; one that the processor lacks is skipped."""
    if request.param not in _native.module().instruction_sets:
        pytest.skip(f"the CPU kernels for {request.param} do not run here")
    monkeypatch.setenv("SEMIMOE_SIMD", request.param)
    return request.param


@pytest.fixture
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable chooses the backend, and the fused one of normalization is the compiled module."""
    monkeypatch.delenv("SEMIMOE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restores the number of threads, which a test may change."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)
