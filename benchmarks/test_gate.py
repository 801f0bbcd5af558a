"""The multi-gating block at the sizes of a training step: gates, gated outputs and the experts' own predictions.

The reference is the published block: it concatenates the features for the means, forms the mixed features of each task,
and applies the heads to them, and each expert's own head to its features. The reference under torch.compile is the peer
that needs no code of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from semimoe_fast import functional as F
from semimoe_fast.model import MultiGating
from semimoe_fast.ops import reference

from .conftest import DIRECTIONS

OPERATION = "project_experts"  # its backend is that of all operations here
HEADS = (2, 1, 2)
Block = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


def published(gating: MultiGating, own_heads: Sequence[nn.Conv2d]) -> Block:
    heads = [[head.weight.flatten(1) for head in gating.heads], [head.bias for head in gating.heads]]

    def block(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        means = torch.cat(list(features), 1).mean((2, 3)).unflatten(1, (len(features), -1))
        gated = reference.multi_gate(features, gating.gate_weights(means), *heads)
        return *gated, *(head(x) for head, x in zip(own_heads, features, strict=True))

    return block


def ours(gating: MultiGating, own_heads: Sequence[nn.Conv2d]) -> Block:
    def block(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        means, projections, own = gating.projections(features, own_heads)
        *gated, _ = gating.mix(means, projections)
        return *gated, *own

    return block


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_multi_gate(
    benchmark, measure, device: torch.device, provider: str, dtype: torch.dtype, batch: int, direction: str, layout: str
) -> None:
    if device.type == "cpu" and (batch > 2 or dtype != torch.float32):
        pytest.skip("on the CPU, only the batch and the precision of its training step are measured")
    benchmark.group = f"multi-gating {direction}, 3 x {batch} x 64 x 256 x 256 {layout}, {dtype}, {device.type}"
    torch.manual_seed(0)
    gating = MultiGating(64, len(HEADS), HEADS, dropout=0.0).to(device)
    own_heads = nn.ModuleList(nn.Conv2d(64, rows, 1) for rows in HEADS).to(device)
    block, naive = ours(gating, own_heads), published(gating, own_heads)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    features = [torch.randn(batch, 64, 256, 256, device=device).contiguous(memory_format=memory_format) for _ in HEADS]
    features = [x.to(dtype).requires_grad_() for x in features]
    if provider == "reference":
        block = naive
    elif provider == "reference compiled":
        block = torch.compile(naive, fullgraph=True, dynamic=False)

    def forward(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return block(features)

    parameters = [*gating.parameters(), *own_heads.parameters()]
    gradients = [torch.randn_like(output) for output in forward(features)]
    with torch.no_grad():
        for output, expected in zip(forward(features), naive([x.float() for x in features]), strict=True):
            # float32: sums of 192 terms; bf16 rounds each to 8 bits
            tolerance = 1e-3 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    measure(forward, features, parameters, gradients, direction)


@pytest.mark.parametrize("batch", [2, 8])
def test_label_projections(benchmark, measure, device: torch.device, provider: str, batch: int) -> None:
    if device.type == "cpu" and batch > 2:
        pytest.skip("on the CPU, only the batch of its training step is measured")
    benchmark.group = f"pseudo-labels from projections, {batch} x 256 x 256, {device.type}"
    projections = torch.randn(batch, 3, sum(HEADS), 256, 256, device=device)
    gates = torch.rand(batch, len(HEADS), 3, device=device)
    biases = [torch.randn(rows, device=device) for rows in HEADS]
    label = F.label_projections
    if provider == "reference compiled":
        label = torch.compile(reference.label_projections, fullgraph=True, dynamic=False)
    expected = reference.label_projections(projections.double(), gates.double(), [bias.double() for bias in biases])
    for result, oracle in zip(label(projections, gates, biases), expected, strict=True):
        disagreement = (result.double() - oracle.double()).abs() > 1e-5  # possible if two outputs are almost equal
        assert disagreement.float().mean() < 1e-4
    measure(lambda inputs: label(*inputs, biases), [projections, gates], [], [], "forward")
