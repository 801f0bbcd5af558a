"""The three objectives of one and of two sets of predictions, at the sizes of a training step.

The reference under torch.compile is the peer that needs no code of this project.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.ops import reference

from .conftest import DIRECTIONS

OPERATION = "objective_terms"  # its backend is that of all operations here
HEADS = (2, 1, 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("sets", [1, 2], ids=["objective_terms", "joint"])
def test_objective_terms(
    benchmark, measure, device: torch.device, provider: str, sets: int, batch: int, direction: str
) -> None:
    benchmark.group = f"objective of {sets} set(s) of predictions, {direction}, {batch} x 256 x 256, {device.type}"
    joint = F.joint_objective_terms
    if provider == "reference compiled":
        joint = torch.compile(reference.joint_objective_terms, fullgraph=True, dynamic=False)
    logits = [torch.randn(batch, rows, 256, 256, device=device).requires_grad_() for _ in range(sets) for rows in HEADS]
    mask = torch.randint(0, 2, (batch, 256, 256), dtype=torch.uint8, device=device)
    targets = (mask, torch.rand(batch, 256, 256, device=device) * 2 - 1, 1 - mask)
    grad_output = torch.tensor([1.0, -2.0, 0.5], device=device)

    def terms(joint, flat: Sequence[Tensor], targets: Sequence[Tensor] = targets) -> Tensor:
        return joint([flat[s : s + 3] for s in range(0, 3 * sets, 3)], *targets)

    exact = [x.detach().double().requires_grad_() for x in logits]
    expected, result = terms(reference.joint_objective_terms, exact), terms(joint, logits)
    # float32 sums of 65,536 probabilities, whose order depends on the provider; gradients relative to the largest
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    oracles = torch.autograd.grad(expected, exact, grad_output.double())
    for gradient, oracle in zip(torch.autograd.grad(result, logits, grad_output), oracles, strict=True):
        torch.testing.assert_close(gradient.double(), oracle, rtol=0, atol=1e-4 * oracle.abs().max().item())

    def forward(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (terms(joint, inputs[:-3], inputs[-3:]),)

    measure(forward, [*logits, *targets], [], [grad_output], direction)
