"""FusedSGD and FusedAdamW against PyTorch's optimizers without fusion."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from semimoe_fast.training.optimizers import FusedAdamW, FusedSGD

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(8, 3, 3, 3), (4, 8, 1, 1), (1, 4, 3, 3), (8,), ()]
Create = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Create, Create, set[str]]] = {  # ours, PyTorch's, and the names of the moments
    "sgd": (
        lambda tensors: FusedSGD(tensors, torch.tensor(0.1), 0.0, 0.01),
        lambda tensors: torch.optim.SGD(tensors, 0.1, 0.0, weight_decay=0.01, foreach=False),
        set(),
    ),
    "sgd with momentum": (
        lambda tensors: FusedSGD(tensors, torch.tensor(0.1), 0.9, 0.01),
        lambda tensors: torch.optim.SGD(tensors, 0.1, 0.9, weight_decay=0.01, foreach=False),
        {"momentum_buffer"},
    ),
    "adamw": (
        lambda tensors: FusedAdamW(tensors, torch.tensor(0.1), 0.01),
        lambda tensors: torch.optim.AdamW(tensors, 0.1, weight_decay=0.01, foreach=False),
        {"exp_avg", "exp_avg_sq"},
    ),
}


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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("of_gradients", LAYOUTS)
@pytest.mark.parametrize("of_parameters", LAYOUTS)
def test_three_steps(of_parameters: str, of_gradients: str, name: str) -> None:
    create, create_expected, moments = OPTIMIZERS[name]
    ours, theirs = (parameters(LAYOUTS[of_parameters]) for _ in range(2))
    optimizer, expected = create(ours), create_expected(theirs)
    for step in range(3):
        for tensors in (ours, theirs):
            set_gradients(tensors, LAYOUTS[of_gradients], step)
        optimizer.step()
        expected.step()
        torch.testing.assert_close(ours, theirs)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert optimizer.state[p].keys() == moments | ({"step"} if name == "adamw" else set())
        for moment in moments:
            torch.testing.assert_close(optimizer.state[p][moment], expected.state[q][moment])
            assert optimizer.state[p][moment].stride() == p.stride()
    assert not optimizer.state[ours[-1]]


@pytest.mark.parametrize("name", ["sgd with momentum", "adamw"])
def test_a_step_copies_no_gradient_and_allocates_nothing(name: str) -> None:
    tensors = parameters(torch.channels_last)
    optimizer = OPTIMIZERS[name][0](tensors)
    set_gradients(tensors, torch.channels_last, 0)
    optimizer.step()
    with profile(record_shapes=True) as profiled:
        optimizer.step()
    copies = [e for e in profiled.events() if e.name in ("aten::clone", "aten::copy_")]
    assert not [e for e in copies if any(e.input_shapes)]  # but AdamW copies its counts, which are scalars
    assert not [e for e in profiled.events() if e.name == "aten::zeros"]


@pytest.mark.parametrize("name", ["sgd with momentum", "adamw"])
def test_loaded_moments_of_other_strides(name: str) -> None:
    create, create_expected, moments = OPTIMIZERS[name]
    ours, theirs = parameters(torch.channels_last), parameters(torch.channels_last)
    optimizer, expected = create(ours), create_expected(theirs)
    for tensors, each in ((ours, optimizer), (theirs, expected)):
        set_gradients(tensors, torch.channels_last, 0)
        each.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        for moment in moments:
            entry[moment] = entry[moment].contiguous()
    optimizer.load_state_dict(state)
    optimizer.step()
    expected.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_with_other_strides_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a parameter \(3, 2\) has strides \(1, 3\)"):
        OPTIMIZERS[name][0]([torch.zeros(2, 3).T])
