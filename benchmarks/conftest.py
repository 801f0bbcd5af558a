"""What the benchmarks of the differentiable operations share: devices, and the clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import ops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROVIDERS = ["reference", "reference compiled", "portable", "fused"]
DIRECTIONS = ["forward", "backward", "both"]
ROUNDS = 7
REPLAYS = 50

Forward = Callable[[], Sequence[Tensor]]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: a backend, which then serves the public functions too, or the reference under torch.compile."""
    operation = request.module.OPERATION
    if request.param == "fused" and ops.choose(operation, device.type)[0] != "fused":
        pytest.skip(ops.choose(operation, device.type)[1])
    monkeypatch.setenv("SEMIMOE_BACKEND", request.param.split()[0])
    return request.param


@pytest.fixture
def measure(benchmark, device: torch.device) -> Callable[[Forward, Sequence[Tensor], Sequence[Tensor], str], None]:
    """Time `forward()`, the backward pass of its outputs with given gradients to given leaves, or both.

    On a GPU, `extra_info` gets two figures more: graph_us, the median of replays of all of it from a CUDA graph, by the
    GPU's clock, and peak_bytes, what a call allocates at most beyond its inputs.
    """

    def run(forward: Forward, leaves: Sequence[Tensor], gradients: Sequence[Tensor], direction: str) -> None:
        for leaf in leaves:
            leaf.requires_grad_(direction != "forward")

        def synchronize() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()

        def prepare() -> tuple[tuple[Sequence[Tensor], ...], dict]:
            outputs = (forward(),) if direction == "backward" else ()
            synchronize()
            return outputs, {}

        def call(*prepared: Sequence[Tensor]) -> None:
            outputs = prepared[0] if prepared else forward()
            if direction != "forward":
                torch.autograd.grad(outputs, leaves, gradients)
            synchronize()

        if device.type == "cuda":
            benchmark.extra_info |= on_gpu(lambda: call(*prepare()[0]), forward, leaves, gradients, direction)
        benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=2)

    return run


def on_gpu(
    whole: Callable[[], None],
    forward: Forward,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    direction: str,
) -> dict[str, float]:
    """Peak memory of a call, and the time of forward and, where it is asked for, backward pass from a CUDA graph."""
    whole()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole()
    figures = {"peak_bytes": torch.cuda.max_memory_allocated() - before}

    def captured() -> None:
        outputs = forward()
        if direction != "forward":
            torch.autograd.grad(outputs, leaves, gradients)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return figures | {"graph_us": statistics.median(times)}
