"""Arithmetic of a step: fused optimizers, --accumulate, --ema, --scale-lr; and its recorded speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semimoe_fast import checkpoint, train
from semimoe_fast.device import configure
from semimoe_fast.training import run_folder
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.state import StateMismatch
from semimoe_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(config: TrainConfig, **changes) -> Trainer:
    config = dataclasses.replace(config, **changes)
    config.check()
    runner = Trainer(config, load_data(config)[0], CPU)
    runner.epoch = 1  # the learning rate of epoch 0 is 0
    return runner


def gradients(runner: Trainer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter, _ in runner._optimized()}


def test_fused_optimizers_equal_the_published_five(tiny_config: TrainConfig) -> None:
    """The published trainer has one SGD for each of four networks and one Adam, all contiguous and not fused."""
    runner = trainer(tiny_config)
    mine = {name: p for name, p, _ in runner._optimized()}
    theirs = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in mine.items()}
    networks = [f"model.experts.{e}." for e in range(3)] + ["model.gating."]
    groups = [[name for name in theirs if name.startswith(network)] for network in networks]
    assert sum(map(len, groups)) == len(theirs) - 1
    c = runner.config
    plain = [
        torch.optim.SGD(
            [theirs[n] for n in names], c.lr, momentum=c.momentum, weight_decay=c.weight_decay, foreach=False
        )
        for names in groups
    ]
    plain.append(
        torch.optim.Adam([theirs["adaptive.log_vars"]], c.log_var_lr, weight_decay=c.weight_decay, foreach=False)
    )
    for batch in [*runner.begin_epoch()] * 2:
        runner.lr.fill_(c.lr)
        runner.train_step(batch)
        for name, gradient in gradients(runner).items():
            theirs[name].grad = gradient.contiguous()
        for optimizer in plain:
            optimizer.step()
        for name, parameter in mine.items():
            torch.testing.assert_close(parameter.detach(), theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def test_accumulated_gradients_are_the_mean_of_the_parts(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, synthetic=(4, 4, 2), labeled_batch=4, unlabeled_batch=4, dropout=0.0)
    runner, plain = trainer(config, accumulate=2), trainer(config)
    (batch,) = runner.begin_epoch()
    plain.model.train()
    plain.weight.fill_(plain.unsupervised_weight)
    expected: dict[str, Tensor] = {}
    totals = []
    for part in batch.parts(2):
        plain.optimizer.zero_grad()
        plain.adam.zero_grad()
        losses = plain._losses(part)
        losses.total.backward()
        totals.append(losses.total.detach())
        expected = {name: expected.get(name, 0) + gradient / 2 for name, gradient in gradients(plain).items()}
    runner.lr.zero_()
    runner.train_step(batch)
    for name, gradient in gradients(runner).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)  # summed in another order
    torch.testing.assert_close(runner.sums["total"], torch.stack(totals).mean())


def test_ema_follows_the_weights(tiny_config: TrainConfig) -> None:
    runner = trainer(tiny_config, ema=0.75)
    runner.epoch = 0
    for name, value in runner.eval_model.state_dict().items():
        assert torch.equal(value, runner.model.state_dict()[name])
    past = []
    for batch in runner.begin_epoch():
        runner.lr.fill_(0.1)
        runner.train_step(batch)
        runner.step += 1
        past.append({name: value.clone() for name, value in runner.model.state_dict().items()})
    assert len(past) == 2
    for name, value in runner.eval_model.state_dict().items():
        mean = (0.75 * past[0][name] + past[1][name]) / 1.75 if value.is_floating_point() else past[1][name]
        torch.testing.assert_close(value, mean, msg=name)
    assert not runner.eval_model.training


def test_best_checkpoint_holds_the_ema(tiny_config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train.main(dataclasses.replace(tiny_config, ema=0.5, epochs=1, warmup_epochs=0, out=folder))
    _, best = checkpoint.read(folder / run_folder.BEST)
    _, last = checkpoint.read(folder / run_folder.LAST)
    sums = {key.removeprefix("average."): value for key, value in last.items() if key.startswith("average.")}
    assert sums
    for key, value in sums.items():
        assert torch.equal(value / (1 - 0.5**2), best[f"model.{key}"])  # two steps
    assert not torch.equal(best["model.gating.heads.0.weight"], last["model.gating.heads.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.gating.heads.0.bias": torch.zeros(3)},
            r"heads.0.bias is float32 \(3,\), not float32 \(2,\)",
        ),
        ({"random.cpu": torch.zeros(3)}, r"random.cpu is float32 \(3,\), not uint8"),
        ({"average.x": torch.zeros(3)}, "average.x is unknown"),
        ({"rank1.random.cpu": torch.zeros(3)}, "sums.total is missing"),
    ],
)
def test_restore_refuses_other_tensors_before_any_change(
    tiny_config: TrainConfig, finished: Path, changes: dict[str, Tensor], message: str
) -> None:
    runner = trainer(tiny_config)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    _, tensors = checkpoint.read(finished / run_folder.LAST)
    with pytest.raises(StateMismatch, match=message):
        runner.restore(tensors | changes, 1, 0)
    assert all(torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "factor"), [({}, 1.0), ({"labeled_batch": 4, "unlabeled_batch": 8}, 3.0), ({"unlabeled": "none"}, 1.0)]
)
def test_learning_rate_scales_with_the_images_in_a_step(tiny_config: TrainConfig, changes: dict, factor: float) -> None:
    runner = trainer(tiny_config, synthetic=(4, 8, 2), scale_lr=True, **changes)
    assert runner.learning_rate == pytest.approx(0.1 * factor)


def test_speed_of_every_epoch_is_recorded(finished: Path) -> None:
    first, *others = (
        json.loads(line)["speed"] for line in (finished / run_folder.METRICS_FILE).read_text().splitlines()
    )
    assert first["warm_up_seconds"] > 0
    for speed in (first, *others):
        assert speed["images_per_second"] > 0
        assert speed["tflop_per_second"] > 0
        assert speed["peak_memory_bytes"] > 2**20
        assert speed["warm_up_seconds"] == first["warm_up_seconds"]


def test_epoch_of_only_warm_up_has_no_speed(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train.main(dataclasses.replace(tiny_config, epochs=2, steps_per_epoch=1, val_every=2, out=tmp_path / "run"))
    lines = (tmp_path / "run" / run_folder.METRICS_FILE).read_text().splitlines()
    first, second = (json.loads(line)["speed"] for line in lines)
    assert (first["images_per_second"], first["tflop_per_second"]) == (None, None)
    assert second["images_per_second"] > 0
    assert first["warm_up_seconds"] == second["warm_up_seconds"] > 0


def test_configure_describes_the_settings() -> None:
    threads = torch.get_num_threads()
    assert configure(CPU, "auto", deterministic=False).endswith(f"threads: {threads}, fp32, channels-last")
    assert configure(CPU, "bf16", deterministic=False).endswith(f"threads: {threads}, bf16 autocast, channels-last")


def test_deterministic_runs_do_not_fill_uninitialized_memory() -> None:
    """PyTorch fills it by default in deterministic mode, at each allocation."""
    configure(CPU, "auto", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
