"""The three objectives: their reference beside the portable backend, at the sizes of a training step."""

from __future__ import annotations

import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast import reference


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [2, 8])
def test_objective_terms(benchmark, measure, device, provider: str, batch: int, backward: bool) -> None:
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"objective terms {direction}, {batch} x 256 x 256, {device.type}"
    predictions = [torch.randn(batch, rows, 256, 256, device=device, requires_grad=True) for rows in (2, 1, 2)]
    mask = torch.randint(0, 2, (batch, 256, 256), dtype=torch.uint8, device=device)
    targets = (mask, torch.rand(batch, 256, 256, device=device), 1 - mask)

    def operation(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.objective_terms(*tensors, *targets),)

    with torch.no_grad():
        expected = reference.objective_terms(*(p.double() for p in predictions), *targets)
        torch.testing.assert_close(operation(*predictions)[0].double(), expected, rtol=1e-4, atol=1e-6)
    measure(operation, predictions, backward)
