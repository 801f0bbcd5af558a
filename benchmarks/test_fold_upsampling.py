"""The folding of the upsampling weights of three experts, once per training step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.ops import reference

from .conftest import DIRECTIONS

OPERATION = "fold_upsampling"
EXPERTS, LEVELS = 3, 4


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [16, 64])
def test_fold_upsampling(
    benchmark,
    measure,
    device: torch.device,
    provider: str,
    width: int,
    dtype: torch.dtype,
    direction: str,
    one_thread: None,
) -> None:
    benchmark.group = f"folding {direction}, {EXPERTS} experts of width {width}, {dtype}, {device.type}"
    shapes = [(width * 2**level, width * 2 ** (level + 1), 3, 3) for level in range(LEVELS)] * EXPERTS
    weights = [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for shape in shapes]
    weights = [weight.requires_grad_() for weight in weights]
    fold = F.fold_upsampling
    if provider == "reference compiled":
        fold = torch.compile(reference.fold_upsampling, fullgraph=True, dynamic=False)

    kernels = fold(weights, dtype)
    gradients = [torch.randn_like(kernel) for kernel in kernels]
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    expected = reference.fold_upsampling(exact)
    oracles = torch.autograd.grad(expected, exact, [gradient.double() for gradient in gradients])
    # sums of up to four numbers, rounded to the dtype of the kernels; gradients are float32
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for kernel, oracle in zip(kernels, expected, strict=True):
        torch.testing.assert_close(kernel.double(), oracle, rtol=tolerance, atol=1e-5)
    for gradient, oracle in zip(torch.autograd.grad(kernels, weights, gradients), oracles, strict=True):
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-6, atol=1e-5)

    def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
        return fold(inputs, dtype)

    measure(forward, weights, [], gradients, direction)
