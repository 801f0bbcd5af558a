"""Batch normalization and ReLU at the sizes of a training step, beside PyTorch's two operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import _native

from .conftest import DEVICES, DIRECTIONS

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
CPU_SETS = [f"ours, {name}" for name in ("plain", "avx2", "avx512")]

BatchNormRelu = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def torch_batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training=True)
    return torch.nn.functional.relu(y, inplace=True)


@pytest.fixture(
    params=[*(("cpu", name) for name in ("torch", *CPU_SETS)), ("cuda", "torch"), ("cuda", "ours")], ids=str
)
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, BatchNormRelu]:
    """A device, and the function to measure on it."""
    device, name = request.param
    if device not in DEVICES:
        pytest.skip(f"PyTorch finds no {device} device")
    if name == "torch":
        return device, torch_batch_norm_relu
    if ops.choose("batch_norm_relu", device)[0] != "fused":
        pytest.skip(ops.choose("batch_norm_relu", device)[1])
    if device == "cpu":
        instruction_set = name.split()[-1]
        if instruction_set not in _native.module().instruction_sets:
            pytest.skip(f"the CPU kernels for {instruction_set} do not run here")
        monkeypatch.setenv("SEMIMOE_SIMD", instruction_set)
    return device, F.batch_norm_relu


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    number = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(number)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(4, 16, 128, 128), (4, 16, 256, 256), (4, 64, 128, 128), (4, 64, 256, 256)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_relu(
    benchmark,
    measure,
    peer: tuple[str, BatchNormRelu],
    layout: str,
    shape: tuple[int, ...],
    threads: int,
    direction: str,
) -> None:
    device, compute = peer
    if device == "cuda" and threads > 1:
        pytest.skip("CPU threads do not matter on a GPU")
    place = f"{threads} thread(s)" if device == "cpu" else device
    benchmark.group = f"batch norm + relu, {direction}, {shape} {layout}, {place}"
    memory_format, channels = LAYOUTS[layout], shape[1]
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.rand(channels, device=device).requires_grad_() for _ in range(2))
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    grad_output = torch.randn(shape, device=device).contiguous(memory_format=memory_format)

    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch_batch_norm_relu(*exact, *(t.double() for t in running))
    result = compute(x, weight, bias, *(t.clone() for t in running))
    # On the CPU PyTorch adds the 262,144 values of a channel one after another in float32.
    tolerance = 5e-3 if compute is torch_batch_norm_relu and device == "cpu" else 1e-5
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    oracles = torch.autograd.grad(expected, exact, grad_output.double())
    for gradient, oracle in zip(torch.autograd.grad(result, [x, weight, bias], grad_output), oracles, strict=True):
        # rounding decides the sign of a few of the numbers before ReLU, and so whether their gradient passes
        assert (gradient.double() - oracle).norm() <= max(tolerance, 1e-3) * oracle.norm()
    del result  # its graph would tie the leaves to the default stream, which a capture must not use

    def forward(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (compute(inputs[0], weight, bias, *running),)

    measure(forward, [x], [weight, bias], [grad_output], direction)
