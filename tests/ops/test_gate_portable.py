"""The gates in PyTorch's own operations: what test_functional.py does not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast.ops import reference


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_empty_batches_are_differentiated(layout: torch.memory_format) -> None:
    def gradients(project_experts: Callable) -> tuple[torch.Tensor, ...]:
        features = [torch.zeros(0, 3, 4, 5).contiguous(memory_format=layout).requires_grad_() for _ in range(2)]
        weights = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
        biases = [torch.randn(2, requires_grad=True) for _ in range(2)]
        means, projections, own = project_experts(features, weights, weights, biases)
        total = means.sum() + projections.sum() + sum(x.sum() for x in own)
        return torch.autograd.grad(total, [*features, *weights, *biases])

    for found, expected in zip(gradients(F.project_experts), gradients(reference.project_experts), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
