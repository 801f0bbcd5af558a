"""FusedSGD against torch.optim.SGD without fusion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from semimoe_fast.training.sgd import FusedSGD

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(8, 3, 3, 3), (4, 8, 1, 1), (1, 4, 3, 3), (8,), ()]


def parameters(layout: torch.memory_format) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    laid_out = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in tensors]
    return [t.requires_grad_() for t in laid_out]


def set_gradients(parameters: list[Tensor], layout: torch.memory_format, seed: int) -> None:
    """All but that of the last parameter, which has none."""
    random = torch.Generator().manual_seed(seed)
    for p in parameters[:-1]:
        grad = torch.randn(p.shape, generator=random)
        p.grad = grad.contiguous(memory_format=layout) if p.ndim == 4 else grad


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("of_gradients", LAYOUTS)
@pytest.mark.parametrize("of_parameters", LAYOUTS)
def test_three_steps(of_parameters: str, of_gradients: str, momentum: float) -> None:
    ours, theirs = (parameters(LAYOUTS[of_parameters]) for _ in range(2))
    optimizer = FusedSGD(ours, torch.tensor(0.1), momentum, 0.01)
    expected = torch.optim.SGD(theirs, 0.1, momentum, weight_decay=0.01, foreach=False)
    for step in range(3):
        for tensors in (ours, theirs):
            set_gradients(tensors, LAYOUTS[of_gradients], step)
        optimizer.step()
        expected.step()
        torch.testing.assert_close(ours, theirs)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        if momentum:
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected.state[q]["momentum_buffer"])
            assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()
        else:
            assert not optimizer.state[p]
    assert not optimizer.state[ours[-1]]


def test_a_step_copies_nothing() -> None:
    tensors = parameters(torch.channels_last)
    optimizer = FusedSGD(tensors, torch.tensor(0.1), 0.9, 0.0)
    set_gradients(tensors, torch.channels_last, 0)
    optimizer.step()
    with profile() as profiled:
        optimizer.step()
    assert not [event.key for event in profiled.key_averages() if event.key in ("aten::clone", "aten::copy_")]


def test_a_loaded_momentum_of_other_strides() -> None:
    ours, theirs = parameters(torch.channels_last), parameters(torch.channels_last)
    optimizer, expected = FusedSGD(ours, torch.tensor(0.1), 0.9, 0.0), torch.optim.SGD(theirs, 0.1, 0.9, foreach=False)
    for tensors, each in ((ours, optimizer), (theirs, expected)):
        set_gradients(tensors, torch.channels_last, 0)
        each.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    optimizer.load_state_dict(state)
    optimizer.step()
    expected.step()
    torch.testing.assert_close(ours, theirs)


def test_parameters_with_other_strides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a parameter \(3, 2\) has strides \(1, 3\)"):
        FusedSGD([torch.zeros(2, 3).T], 0.1, 0.9, 0.0)
