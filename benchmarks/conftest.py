"""What the benchmarks of the differentiable operations share: providers, devices, and a check before the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Operation = Callable[..., Sequence[Tensor]]


@pytest.fixture(params=["reference", "portable"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that serves the public functions during one benchmark."""
    monkeypatch.setenv("SEMIMOE_BACKEND", request.param)
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def measure(benchmark, device: torch.device) -> Callable[[Operation, Sequence[Tensor], bool], None]:
    """Time `operation(*inputs)`, with its backward pass if asked for, until the device is done."""

    def run(operation: Operation, inputs: Sequence[Tensor], backward: bool) -> None:
        def timed() -> None:
            with torch.set_grad_enabled(backward):
                outputs = operation(*inputs)
            if backward:
                torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
            if device.type == "cuda":
                torch.cuda.synchronize()

        timed()
        benchmark(timed)

    return run
