"""The folded copy of a model predicts what the model predicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semimoe_fast.inference import folded
from semimoe_fast.model import BatchNormReLU, SemiMoE, UpsamplingConv2d


def trained(**arguments) -> SemiMoE:
    """A model whose batch normalization has seen images and has other scales and shifts than 1 and 0."""
    model = SemiMoE(width=4, **arguments)
    for layer in model.modules():
        if isinstance(layer, BatchNormReLU):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(2, 3, 48, 48))
    return model.double()  # float32 rounding grows through the layers, and says nothing about the formula


@torch.no_grad()
def test_predictions_are_equal() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = folded(model)  # in eval mode, whatever the mode of the model
    images = torch.rand(2, 3, 40, 50, dtype=torch.float64)
    expected, found = model.eval()(images), fast(images)
    for name in ("mask", "boundary"):
        difference = getattr(found, name).softmax(1) - getattr(expected, name).softmax(1)
        assert difference.abs().max() < 1e-10
    assert (found.sdf.tanh() - expected.sdf.tanh()).abs().max() < 1e-10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(layer, BatchNormReLU | UpsamplingConv2d) for layer in fast.modules())


@torch.no_grad()
def test_only_the_tasks_that_are_asked_for() -> None:
    model = trained(expert_tasks=("mask", "sdf", "boundary", "mask")).eval()
    fast, images = folded(model, ["boundary", "mask"]), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    expected, found = model(images), fast(images)
    assert found.sdf is None
    assert fast.tasks == ("boundary", "mask")
    for name in fast.tasks:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    assert folded(fast, ["boundary", "mask"]) is fast
    assert folded(folded(model)).tasks == model.tasks
    assert folded(fast, ["mask"]).tasks == ("mask",)
    with pytest.raises(ValueError, match="the model has no expert for 'sdf', its experts learn boundary, mask"):
        folded(fast, ["sdf"])


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_every_convolution_reads_and_writes_channels_last(count: int) -> None:
    """Else PyTorch copies the features into another order before a convolution: a fifth of the time at width 16."""
    model = folded(SemiMoE(width=16), ["mask"])
    seen = []

    def note(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, output))

    for layer in model.experts.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(note)
    images = torch.rand(count, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for expert in model.experts:
        expert.features(images)
    assert all(seen)
    assert len(seen) == 2 * 3 * 22
