"""The multi-gate: its reference beside the portable backend, at the sizes of a training step."""

from __future__ import annotations

import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast import reference

HEADS = (2, 1, 2)


@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [2, 8])
def test_multi_gate(benchmark, measure, device, provider: str, batch: int, backward: bool, layout: str) -> None:
    if device.type == "cpu" and batch > 2:
        pytest.skip("the CPU is measured at the batch of a training step")
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"multi-gate {direction}, 3 x {batch} x 64 x 256 x 256 {layout}, {device.type}"
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    shapes = [(batch, 3, 3), *((rows, 64) for rows in HEADS), *((rows,) for rows in HEADS)]
    features = [torch.randn(batch, 64, 256, 256, device=device).contiguous(memory_format=memory_format) for _ in "123"]
    inputs = [t.requires_grad_() for t in (*features, *(torch.randn(s, device=device) for s in shapes))]

    def operation(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.multi_gate(tensors[:3], tensors[3], tensors[4:7], tensors[7:])

    with torch.no_grad():
        expected = reference.multi_gate(inputs[:3], inputs[3], inputs[4:7], inputs[7:])
        for result, oracle in zip(operation(*inputs), expected, strict=True):
            torch.testing.assert_close(result, oracle, rtol=1e-3, atol=1e-3)  # float32 sums of 192 terms
    measure(operation, inputs, backward)
