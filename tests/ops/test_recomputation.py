"""Steps that compute normalization again in the backward pass: equal gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE
from semimoe_fast.objective import objective
from semimoe_fast.ops import batch_norm
from semimoe_fast.ops.recomputation import recompute, remember

EXPERTS, NORMS = 3, 22  # NORMS an expert
pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def remade(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all normalizations that are computed again."""
    inputs: list[Tensor] = []
    evaluate = batch_norm._forward_with

    def spy(x: Tensor, *parameters: Tensor) -> Tensor:
        inputs.append(x)
        return evaluate(x, *parameters)

    monkeypatch.setattr(batch_norm, "_forward_with", spy)
    return inputs


def gradients(
    dtype: torch.dtype, layout: torch.memory_format, width: int, size: tuple[int, int], again: bool
) -> list[Tensor]:
    """Gradients and buffers after a step of both batches; dtype bfloat16: autocast."""
    torch.manual_seed(0)
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    model = SemiMoE(width=width).to(dtype=own, memory_format=layout).train()
    adaptive = AdaptiveMultiObjectiveLoss().to(own)
    labeled, unlabeled = torch.randn(2, 2, 3, *size, dtype=own).unbind()
    mask = (torch.randn(2, *size) > 0).byte()
    targets = mask, torch.randn(2, *size, dtype=own), mask
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if again:
            with recompute():
                total = objective(model, adaptive, labeled, targets, unlabeled, 0.5).total
        else:
            total = objective(model, adaptive, labeled, targets, unlabeled, 0.5).total
    total.backward()
    return [p.grad for p in (*model.parameters(), *adaptive.parameters())] + list(model.buffers())


@pytest.mark.parametrize(
    ("dtype", "layout", "width", "size"),
    [
        (torch.float32, torch.channels_last, 4, (48, 32)),
        (torch.float32, torch.channels_last, 16, (33, 20)),  # whose normalization writes concatenations
        (torch.float32, torch.contiguous_format, 4, (33, 20)),
        (torch.bfloat16, torch.channels_last, 4, (33, 20)),
        (torch.bfloat16, torch.channels_last, 16, (48, 32)),
        (torch.bfloat16, torch.contiguous_format, 4, (48, 32)),
        (torch.float64, torch.channels_last, 4, (33, 20)),
    ],
    ids=str,
)
def test_gradients_are_bitwise_equal(
    dtype: torch.dtype, layout: torch.memory_format, width: int, size: tuple[int, int], remade: list[Tensor]
) -> None:
    """Two groups in each normalization. All but the last of an expert, which the gates read, are computed again."""
    expected = gradients(dtype, layout, width, size, again=False)
    assert not remade
    result = gradients(dtype, layout, width, size, again=True)
    assert [i for i, (x, y) in enumerate(zip(result, expected, strict=True)) if not torch.equal(x, y)] == []
    layers = {x.data_ptr() for x in remade}
    assert len(layers) == (0 if dtype == torch.float64 else EXPERTS * (NORMS - 1))  # float64 is portable


def test_a_graph_may_be_used_twice(remade: list[Tensor]) -> None:
    """Also outside of the block, and with create_graph, with which the backward pass saves tensors itself."""
    norm, convolution = batch_norm_of(3), nn.Conv2d(3, 2, 3)
    with recompute():
        y = norm(torch.randn(2, 3, 8, 8, requires_grad=True))
        z = convolution(y).square().sum()
        for create_graph in (True, False):
            inner = torch.autograd.grad(z, convolution.weight, retain_graph=True, create_graph=create_graph)
            outer = torch.autograd.grad(z, convolution.weight, retain_graph=True)
            assert torch.equal(inner[0], outer[0])
    assert torch.equal(torch.autograd.grad(z, convolution.weight)[0], outer[0])
    assert len(remade) == 5
    with pytest.raises(RuntimeError, match="second time"):
        z.backward()


def batch_norm_of(channels: int):
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    return lambda x: batch_norm.batch_norm_relu(x, weight, bias, None, None)


def test_other_tensors_are_kept_as_they_are() -> None:
    """Outside of the block and for tensors without a recipe."""
    x = torch.randn(3, requires_grad=True)
    y = remember(x * 2, lambda x: x * 3, x)  # a wrong recipe, which nothing may use here
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], 8 * x)
    with recompute():
        z = (x * 2).square().sum()
    assert torch.equal(torch.autograd.grad(z, x)[0], 8 * x)
    with recompute():
        y = remember(x * 2, lambda x: x * 3, x)
        z = y.square().sum()
    assert torch.equal(torch.autograd.grad(z, x)[0], 12 * x)  # 2 * 2 (3 x): the recipe is what the backward pass uses


def test_fake_tensors() -> None:
    """What makes a tensor again under a dispatch mode is the custom op, which the mode sees."""
    norm, convolution = batch_norm_of(3), nn.Conv2d(3, 2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True), recompute():
        z = convolution(norm(torch.randn(2, 3, 8, 8, requires_grad=True)))
        (gradient,) = torch.autograd.grad(z.sum(), convolution.weight)
    assert gradient.shape == convolution.weight.shape
