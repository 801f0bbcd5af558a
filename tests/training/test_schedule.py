"""Learning rate against the published schedule, order of the images, keyed generators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.schedule import epoch_order, generator, learning_rate, step_decay, unsupervised_weight


def test_learning_rate_matches_the_published_schedule() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "schedule.json").read_text())
    rates = [
        step_decay(epoch, golden["lr"], golden["warmup_epochs"], golden["step_size"], golden["gamma"])
        for epoch in range(len(golden["lr_used_in_epoch"]))
    ]
    assert len(rates) == 200
    assert rates == pytest.approx(golden["lr_used_in_epoch"], rel=1e-12)  # a few float64 products


def test_learning_rate_without_warm_up_starts_at_its_base() -> None:
    assert [step_decay(epoch, 0.5, 0, 2, 0.1) for epoch in range(4)] == pytest.approx([0.5, 0.5, 0.5, 0.05])


def test_the_schedule_of_a_run_is_the_published_one_or_a_cosine() -> None:
    published = TrainConfig()
    assert [learning_rate(published, epoch, 0.5) for epoch in (0, 10, 20, 70, 71)] == [0, 0.25, 0.5, 0.5, 0.25]
    run = TrainConfig(schedule="cosine", epochs=10, warmup_epochs=2)
    rates = [learning_rate(run, epoch, 6.0) for epoch in range(10)]
    assert rates[:3] == pytest.approx([2, 4, 6])
    assert rates[6] == pytest.approx(3)  # halfway
    torch_s = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=6.0), T_max=8)
    for rate in rates[2:]:
        assert rate == pytest.approx(torch_s.get_last_lr()[0])
        torch_s.optimizer.step()
        torch_s.step()


def test_unsupervised_weight_grows_linearly() -> None:
    assert unsupervised_weight(40, 200, 0.5) == pytest.approx(0.1025)
    assert unsupervised_weight(199, 200, 0.5) == 0.5


@pytest.mark.parametrize(("available", "needed"), [(17, 68), (17, 70), (68, 68), (5, 3), (1, 4), (4, 0)])
def test_order_takes_all_samples_equally_often(available: int, needed: int) -> None:
    order = epoch_order(available, needed, generator(0, 1))
    counts = torch.bincount(order, minlength=available)
    assert len(order) == needed
    assert counts.max() - counts.min() <= 1


def test_random_numbers_depend_on_the_whole_key() -> None:
    draws = {key: torch.rand(4, generator=generator(*key)).tolist() for key in ((0, 1), (0, 2), (1, 1), (0, 1, 0))}
    assert len({tuple(values) for values in draws.values()}) == len(draws)
    assert torch.rand(4, generator=generator(0, 1)).tolist() == draws[0, 1]
