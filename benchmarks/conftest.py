"""Fixtures of the benchmarks: devices, providers, exact float32, inputs that exceed the caches, and timing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import ops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROVIDERS = ["reference", "reference compiled", "portable", "fused"]
DIRECTIONS = ["forward", "backward", "both"]
ROUNDS = 7
REPLAYS = 20

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """Turn TF32 off, for the measured code and for the results that it is checked against."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def clock() -> float:
    """Time in seconds, after the GPU has finished. It is read once per round, so the calls of a round do not wait."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def copies_beyond_cache(input_bytes: int, device: torch.device) -> int:
    """Number of copies of the inputs that together exceed the GPU's L2 cache, so that no call finds its copy there.

    On the CPU it is 1: there the measurement includes the effect of the caches.
    """
    if device.type != "cuda":
        return 1
    return 1 + torch.cuda.get_device_properties(device).L2_cache_size // input_bytes


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Measure on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The measured implementation: a backend, which the public functions then use, or the compiled reference."""
    operation = request.module.OPERATION
    if request.param == "fused" and ops.choose(operation, device.type)[0] != "fused":
        pytest.skip(ops.choose(operation, device.type)[1])
    monkeypatch.setenv("SEMIMOE_BACKEND", request.param.split()[0])
    torch.compiler.reset()  # Dynamo limits the number of compiled shapes
    return request.param


@pytest.fixture
def measure(
    benchmark, device: torch.device
) -> Callable[[Forward, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], str], None]:
    """Time `forward(inputs)`, its backward pass with given gradients of the outputs, or both.

    The backward pass computes the gradients of the parameters and of the inputs with requires_grad. On a GPU, the calls
    use several copies of the inputs in turn. For forward and for both, `extra_info` then has graph_us, the time of a
    call within a CUDA graph by CUDA events, and peak_bytes, the peak memory of a call beyond its inputs.
    """

    def run(
        forward: Forward,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        direction: str,
    ) -> None:
        leaves = [*parameters, *(x for x in inputs if x.requires_grad)]
        for leaf in leaves:
            leaf.requires_grad_(direction != "forward")
        copies = [
            [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            for _ in range(copies_beyond_cache(sum(x.nbytes for x in inputs), device))
        ]
        turn = itertools.cycle(copies)

        def compute(copy: Sequence[Tensor], outputs: Sequence[Tensor] | None = None) -> None:
            outputs = forward(copy) if outputs is None else outputs
            if direction != "forward":
                leaves = [x for x in (*copy, *parameters) if x.requires_grad]
                torch.autograd.grad(outputs, leaves, gradients)

        def synchronize() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()

        def prepare() -> tuple[tuple, dict]:
            copy = next(turn)
            outputs = forward(copy) if direction == "backward" else None
            synchronize()
            return (copy, outputs), {}

        def call(copy: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> None:
            compute(copy, outputs)
            synchronize()

        if device.type == "cuda":
            benchmark.extra_info["copies"] = len(copies)
        if device.type == "cuda" and direction != "backward":
            benchmark.extra_info |= on_gpu(compute, copies)
        benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=2)

    return run


def on_gpu(compute: Callable[[Sequence[Tensor]], None], copies: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Peak memory of a call on one copy (peak_bytes), and time of a call in a CUDA graph over all copies (graph_us)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute(copies[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compute(copies[0])
    figures = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            compute(copy)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(copies))
    return figures | {"graph_us": statistics.median(times)}
