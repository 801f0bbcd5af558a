"""A skip connection on a CPU at the sizes of a training step: pooling, normalization and concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.ops import _native
from semimoe_fast.ops.skips import pool_and_skip

from .conftest import DIRECTIONS

Level = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> pooled features, concatenation


def by_operators(features: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's pooling and concatenation, with our normalization."""
    y = F.batch_norm_relu(x, weight, bias, None, None, groups=2)
    return torch.nn.functional.max_pool2d(features, 2), torch.cat([features, y], 1)


def ours(features: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pooled, skip = pool_and_skip(features)
    return pooled, F.batch_norm_relu(x, weight, bias, None, None, groups=2, skip=skip)


@pytest.mark.parametrize("level", [by_operators, ours])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(4, 16, 256, 256), (4, 64, 64, 64), (4, 32, 256, 256)], ids=str)
def test_skip_connection(
    benchmark, measure, device: torch.device, shape: tuple[int, ...], direction: str, level: Level
) -> None:
    if device.type != "cpu" or _native.module() is None:
        pytest.skip("the compiled module computes skip connections on the CPU alone")
    benchmark.group = f"skip connection, {direction}, {shape}, {torch.get_num_threads()} thread(s)"

    def channels_last(*sizes: int) -> Tensor:
        return torch.randn(sizes).contiguous(memory_format=torch.channels_last)

    batch, channels, height, width = shape
    features, x = (channels_last(*shape).requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(channels).requires_grad_() for _ in range(2))
    gradients = [
        channels_last(batch, channels, height // 2, width // 2),
        channels_last(batch, 2 * channels, height, width),
    ]
    inputs = [features, x, weight, bias]
    result, expected = level(*inputs), by_operators(*inputs)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(result, inputs, gradients), torch.autograd.grad(expected, inputs, gradients), rtol=0, atol=0
    )

    def forward(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return level(*inputs, weight, bias)

    measure(forward, [features, x], [weight, bias], gradients, direction)
