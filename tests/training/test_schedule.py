"""Learning rate against the published schedule, order of the images, keyed generators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semimoe_fast.training.schedule import epoch_order, generator, learning_rate, unsupervised_weight


def test_learning_rate_matches_the_published_schedule() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "schedule.json").read_text())
    rates = [
        learning_rate(epoch, golden["lr"], golden["warmup_epochs"], golden["step_size"], golden["gamma"])
        for epoch in range(len(golden["lr_used_in_epoch"]))
    ]
    assert len(rates) == 200
    assert rates == pytest.approx(golden["lr_used_in_epoch"], rel=1e-12)  # a few float64 products


def test_learning_rate_without_warm_up_starts_at_its_base() -> None:
    assert [learning_rate(epoch, 0.5, 0, 2, 0.1) for epoch in range(4)] == pytest.approx([0.5, 0.5, 0.5, 0.05])


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
