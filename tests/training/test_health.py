"""The health of the experts, on experts whose last ReLU was shut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from semimoe_fast import train
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.folders import Dataset
from semimoe_fast.data.ragged import Ragged, starts_of
from semimoe_fast.inference.predictor import foreground
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import run
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.health import MANY, Health, expert_health, warn_of_dead_experts
from semimoe_fast.training.run import Run

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 2.0)
TASKS = ("mask", "sdf", "boundary")


def images(number: int) -> Dataset:
    pixels = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8)
    return Dataset(pixels, torch.zeros(number, 32, 32, dtype=torch.uint8), [f"{i}.png" for i in range(number)])


def shut(model: SemiMoE, expert: int, channels: int) -> None:
    """Make the last features of an expert 0: BN's weight 0 and bias -1 before the ReLU."""
    norm = model.experts[expert].decoder[-1][-1]
    with torch.no_grad():
        norm.weight[:channels], norm.bias[:channels] = 0.0, -1.0


def test_dead_channels_and_spread() -> None:
    model = SemiMoE(width=4)
    shut(model, 1, 4)
    shut(model, 2, 1)
    dataset = images(11)
    health = expert_health(model, dataset, PREPROCESSING, CPU)
    assert health.dead_channels == (0.0, 1.0, 0.25)
    assert health.spread[1] == 0

    mean, std = (torch.tensor(values)[:, None, None] for values in PREPROCESSING[1:3])
    with torch.no_grad():
        output = model((dataset.images / 255 - mean) / std)
    expected = foreground(output, TASKS)["boundary expert"].double().std(correction=0)
    torch.testing.assert_close(health.spread[2], expected.item(), rtol=1e-5, atol=0)


def test_larger_images_are_resized() -> None:
    model, dataset = SemiMoE(width=4), images(3)
    larger = dataclasses.replace(dataset, images=dataset.images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    small, large = (expert_health(model, given, PREPROCESSING, CPU) for given in (dataset, larger))
    torch.testing.assert_close(large.spread, small.spread, rtol=1e-5, atol=0)


def test_at_most_16_images_are_cut_and_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of any size, too: to cut the middle of all would take more memory than the run."""
    model, windows, cut, predicted = SemiMoE(width=2), Ragged.windows, [], []
    run = model.run_experts
    monkeypatch.setattr(model, "run_experts", lambda pixels: predicted.append(len(pixels)) or run(pixels))
    monkeypatch.setattr(
        Ragged, "windows", lambda self, rows, *rest: cut.append(len(rows)) or windows(self, rows, *rest)
    )
    for number, examined in ((1, 1), (16, 16), (17, 9), (100, 15)):
        sizes = torch.tensor([[20, 50]]).expand(number, 2)
        pixels = torch.randint(0, 256, (number * 1000, 3), dtype=torch.uint8)
        expert_health(model, Ragged(pixels, None, starts_of(sizes), sizes, ["a"] * number), PREPROCESSING, CPU)
        assert sum(cut) == sum(predicted) == examined
        cut.clear()
        predicted.clear()


def test_warns_once_of_an_expert_that_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well, ill = Health((0.0, 0.25, 0.0), (0.3, 0.3, 0.3)), Health((0.0, 0.875, 0.0), (0.3, 0.01, 0.3))
    for before, now in ((None, well), (well, ill), (ill, ill)):
        warn_of_dead_experts(TASKS, now, before, 7, tmp_path)
    assert capsys.readouterr().err.count("at epoch 8, 88% of the features of the sdf expert are 0") == 1


def test_run_records_health_and_warns(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = Run.start

    def with_dead_expert(*arguments: object) -> Run:
        run = start(*arguments)
        shut(run.trainer.model, 1, run.config.width)
        return run

    monkeypatch.setattr(Run, "start", with_dead_expert)
    train.main(dataclasses.replace(tiny_config, out=tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [r["health"]["dead_channels"][1] for r in records if "val" in r] == [1.0] * len(records)
    assert "of the features of the sdf expert are 0 on labeled images" in capsys.readouterr().err


def test_validation_and_health_do_not_tune_cudnn(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches have many shapes, each of which cudnn.benchmark would try all algorithms for."""
    tuned = []

    def watch(name: str) -> None:
        function = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *a: tuned.append(torch.backends.cudnn.benchmark) or function(*a))

    watch("count_set")
    watch("expert_health")
    torch.backends.cudnn.benchmark = True
    train.main(dataclasses.replace(tiny_config, epochs=1, warmup_epochs=0, out=tmp_path / "run"))
    assert tuned == [False, False]
    assert torch.backends.cudnn.benchmark


def test_three_quarters_are_many(tmp_path, capsys):
    health = Health((MANY, 0.0, 0.0), (0.3, 0.3, 0.3))
    warn_of_dead_experts(TASKS, health, None, 0, tmp_path)
    assert "75% of the features of the mask expert are 0" in capsys.readouterr().err


def test_a_channel_that_some_images_use_is_alive(monkeypatch):
    model, calls = SemiMoE(width=4), []
    run_experts = model.run_experts

    def shut_after_the_first(pixels):
        calls.append(len(pixels))
        means, *rest = run_experts(pixels)
        return means * (len(calls) == 1), *rest

    monkeypatch.setattr(model, "run_experts", shut_after_the_first)
    health = expert_health(model, images(11), PREPROCESSING, CPU)
    assert calls == [8, 3]
    assert health.dead_channels == (0, 0, 0)
