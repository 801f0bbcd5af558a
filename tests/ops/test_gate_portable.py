"""The gates in PyTorch's own operations: what test_functional.py does not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import semimoe_fast
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


def test_gradients_of_biases_are_summed_in_float32():
    features = [torch.randn(2, 4, 17, 19).bfloat16()]
    bias = torch.zeros(1, requires_grad=True)
    with semimoe_fast.backend("portable"):
        _, _, (own,) = F.project_experts(features, [torch.randn(2, 4)], [torch.randn(1, 4)], [bias])
    own.backward(torch.ones_like(own))
    assert bias.grad.item() == 2 * 17 * 19  # bfloat16 rounds it to 648


def test_autocast_keeps_the_dtype_of_projections():
    projections, weights, biases = torch.randn(2, 3, 5, 4, 4), torch.rand(2, 3, 3), [*map(torch.zeros, (2, 1, 2))]
    with semimoe_fast.backend("portable"):
        expected = F.mix_projections(projections, weights, biases)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(F.mix_projections(projections, weights, biases), expected, rtol=0, atol=0)
