"""CUDA graphs and torch.compile: graphed, recorded and compiled steps train like eager steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semimoe_fast.training.batches import Images
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.graphs import WARM_UP, GraphedStep
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: it records the operators of a call and the memory of their results, then replays them.

    Unlike a CUDA graph's capture, recording runs the call, so the first replay does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.fresh = True

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((arguments, keywords))}
        made = [None if r.untyped_storage().data_ptr() in given else r for r in tensors(results)]
        self.calls.append((function, arguments, keywords or {}, made))
        return results

    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        with torch.no_grad():
            for function, arguments, keywords, made in self.calls:
                for result, place in zip(tensors(function(*arguments, **keywords)), made, strict=True):
                    if place is not None:
                        place.copy_(result)

    @classmethod
    def capture(cls, call: Callable[[], None]) -> Callable[[], None]:
        with cls() as tape:
            call()
        # Operators that synchronize a GPU.
        synchronizing = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
        assert not synchronizing & {function.name().split(".")[0] for function, *_ in tape.calls}
        return tape.replay


def tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def trainer(config: TrainConfig, device: torch.device = CPU, **changes) -> Trainer:
    config = dataclasses.replace(config, **changes)
    config.check()
    return Trainer(config, load_data(config)[0], device)


def train(runner: Trainer) -> dict[str, Tensor]:
    """Train all epochs; return model, state and sums. The schedules change from epoch to epoch."""
    for _ in range(runner.config.epochs):
        assert runner.train_epoch(stop=lambda: False, progress=lambda: None)
        sums = {f"epoch {runner.epoch} {name}": total.clone() for name, total in runner.sums.items()}
        runner.next_epoch()
    return sums | runner.state() | runner.model.state_dict()


OPTIONS = [
    {},
    {"accumulate": 2, "labeled_batch": 4, "unlabeled_batch": 4},
    {"ema": 0.9, "instances": True, "recompute": True},
    {"unlabeled": "none", "steps_per_epoch": 2},
    RECIPES["strong"],
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_replayed_step_equals_the_eager_step(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """Bitwise, with changing batches, learning rates, u and dropout: a replay must read all of them from memory.

    The portable backend, because the tape cannot record native code.
    """
    monkeypatch.setenv("SEMIMOE_BACKEND", "portable")
    config = dataclasses.replace(tiny_config, synthetic=(4, 8, 2), epochs=5)
    expected = train(trainer(config, **changes))
    graphed = trainer(config, **changes)
    graphed.update = GraphedStep(graphed._update, CPU, Tape.capture)
    result = train(graphed)
    assert graphed.update.calls > WARM_UP + 3
    assert result.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(result[key], expected[key])] == []


def test_tape_detects_python_numbers() -> None:
    """The test above can fail: a step that reads a Python number replays its first value."""
    factor, seen = iter(range(1, 100)), torch.zeros(())

    def step(inputs: Images) -> None:
        seen.add_(inputs.images * next(factor))

    graphed = GraphedStep(step, CPU, Tape.capture)
    for _ in range(WARM_UP + 3):
        graphed(Images(torch.ones(()), None, None))
    assert seen == 1 + 2 + 3 + 3 * (WARM_UP + 1)


@CUDA
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_cuda_graph_equals_the_eager_step(tiny_config: TrainConfig, changes: dict) -> None:
    """Up to the order of summation, because cuDNN may choose other algorithms; dropout draws the same numbers."""
    options = {"synthetic": (4, 8, 2), "epochs": 5, "lr": 0.01, "device": "cuda", "precision": "fp32"}
    if changes.get("optimizer") == "adamw":  # its steps are as large as --lr, and rounding may turn their sign
        changes = changes | {"lr": 1e-4}
    config = dataclasses.replace(tiny_config, **options | changes)
    graphed, eager = (trainer(config, torch.device("cuda"), cuda_graph=graph) for graph in (True, False))
    torch.cuda.manual_seed(0)
    result = train(graphed)
    torch.cuda.manual_seed(0)
    expected = train(eager)
    assert isinstance(graphed.update, GraphedStep)
    assert graphed.update.calls > WARM_UP + 3
    for key, value in expected.items():
        if not key.startswith(("random", "optim")):
            torch.testing.assert_close(result[key], value, rtol=1e-2, atol=1e-2, msg=key)


@CUDA
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_does_not_synchronize_the_device(tiny_config: TrainConfig, recipe: str) -> None:
    runner = trainer(tiny_config, torch.device("cuda"), device="cuda", cuda_graph=False, **RECIPES[recipe])
    batches = list(runner.begin_epoch())
    runner.train_step(batches[0])  # the first step may compile kernels and allocate workspaces
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.train_step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_experts_take_both_batches(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    result, expected = train(trainer(tiny_config, compile="default")), train(trainer(tiny_config))
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(result[key], value), key


@pytest.mark.slow
def test_compiled_experts_equal_eager_experts(tiny_config: TrainConfig) -> None:
    """The three experts have the same width and share one compilation."""
    from torch._dynamo.utils import counters

    config = dataclasses.replace(tiny_config, dropout=0.0, lr=0.01)
    counters.clear()
    torch.compiler.reset()
    result, expected = train(trainer(config, compile="default")), train(trainer(config))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for key, value in expected.items():
        if value.is_floating_point() and not key.startswith("optim"):
            # other order of fp32 sums, over 23 layers whose BN sees as few as 8 pixels
            torch.testing.assert_close(result[key], value, rtol=1e-2, atol=1e-2, msg=key)
