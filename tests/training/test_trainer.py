"""The step's arithmetic: optimizers together, parts of a batch, one forward for two batches, the average of weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semimoe_fast import checkpoint, train
from semimoe_fast.device import configure
from semimoe_fast.objective import objective
from semimoe_fast.training import config, run_folder
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(options: list[str], **changes) -> Trainer:
    parsed = dataclasses.replace(config.parse(options), **changes)
    parsed.check()
    runner = Trainer(parsed, load_data(parsed)[0], CPU)
    runner.epoch = 1  # at the first, the learning rate is 0
    return runner


def gradients(runner: Trainer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter, _ in runner._optimized()}


def test_one_fused_sgd_is_five_optimizers(tiny: list[str]) -> None:
    """As published: an SGD for each of the four networks and an Adam, written out; the layout is channels-last."""
    runner = trainer(tiny)
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


def test_accumulated_gradients_are_the_mean_of_the_parts(tiny: list[str]) -> None:
    options = [*tiny, *"--synthetic 4 4 2 --labeled-batch 4 --unlabeled-batch 4 --dropout 0".split()]
    runner, plain = trainer(options, accumulate=2), trainer(options)
    (batch,) = runner.begin_epoch()
    plain.model.train()
    plain.weight.fill_(plain.unsupervised_weight)
    expected: dict[str, Tensor] = {}
    totals = []
    for part in batch.parts(2):
        plain.sgd.zero_grad()
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


def test_joint_forward_is_the_same_but_for_batch_norm(tiny: list[str]) -> None:
    runner = trainer([*tiny, "--dropout", "0"])
    (batch, *_) = runner.begin_epoch()
    images, masks = runner._augmented(batch.labeled)
    targets = (masks, torch.rand(masks.shape), masks)
    unlabeled, _ = runner._augmented(batch.unlabeled)

    def losses(joint: bool) -> list[Tensor]:
        return list(objective(runner.model, runner.adaptive, images, targets, unlabeled, 0.5, joint_forward=joint))

    runner.model.eval()  # BN by its running statistics, whatever the batch
    for together, apart in zip(losses(True), losses(False), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    runner.model.train()
    counter = runner.model.experts[0].encoder[0][1].num_batches_tracked
    before = counter.item()
    assert (losses(True)[0] - losses(False)[0]).abs() > 1e-4
    assert counter.item() == before + 1 + 2


def test_average_follows_the_weights(tiny: list[str]) -> None:
    runner = trainer(tiny, ema=0.75)
    runner.epoch = 0
    for name, value in runner.evaluated.state_dict().items():
        assert torch.equal(value, runner.model.state_dict()[name])
    past = []
    for batch in runner.begin_epoch():
        runner.lr.fill_(0.1)
        runner.train_step(batch)
        runner.step += 1
        past.append({name: value.clone() for name, value in runner.model.state_dict().items()})
    assert len(past) == 2
    for name, value in runner.evaluated.state_dict().items():
        mean = (0.75 * past[0][name] + past[1][name]) / 1.75 if value.is_floating_point() else past[1][name]
        torch.testing.assert_close(value, mean, msg=name)
    assert not runner.evaluated.training


def test_average_is_what_is_validated_and_kept_as_best(tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train.main([*tiny, "--ema", "0.5", "--epochs", "1", "--warmup-epochs", "0", "--out", str(folder)])
    _, best = checkpoint.read(folder / run_folder.BEST)
    _, last = checkpoint.read(folder / run_folder.LAST)
    sums = {key.removeprefix("average."): value for key, value in last.items() if key.startswith("average.")}
    assert sums
    for key, value in sums.items():
        assert torch.equal(value / (1 - 0.5**2), best[f"model.{key}"])  # two steps
    assert not torch.equal(best["model.gating.heads.0.weight"], last["model.gating.heads.0.weight"])


@pytest.mark.parametrize(
    ("options", "factor"), [("", 1.0), ("--labeled-batch 4 --unlabeled-batch 8", 3.0), ("--unlabeled none", 1.0)]
)
def test_learning_rate_grows_with_the_images_of_a_step(tiny: list[str], options: str, factor: float) -> None:
    options = [*tiny, *"--synthetic 4 8 2 --scale-lr".split(), *options.split()]
    assert trainer(options).learning_rate == pytest.approx(0.1 * factor)


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


def test_epoch_that_only_warms_up_has_no_speed(tiny: list[str], tmp_path: Path) -> None:
    train.main([*tiny, *"--epochs 2 --steps-per-epoch 1 --val-every 2".split(), "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / run_folder.METRICS_FILE).read_text().splitlines()
    first, second = (json.loads(line)["speed"] for line in lines)
    assert (first["images_per_second"], first["tflop_per_second"]) == (None, None)
    assert second["images_per_second"] > 0
    assert first["warm_up_seconds"] == second["warm_up_seconds"] > 0


def test_settings_are_told() -> None:
    threads = torch.get_num_threads()
    assert configure(CPU, "auto", deterministic=False).endswith(f"threads: {threads}, fp32, channels-last")
    assert configure(CPU, "bf16", deterministic=False).endswith(f"threads: {threads}, bf16 autocast, channels-last")


def test_deterministic_runs_do_not_fill_memory() -> None:
    """Which PyTorch else does with all that is allocated uninitialized, at each step."""
    configure(CPU, "auto", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
