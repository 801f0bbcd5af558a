"""Dice and Jaccard compared with the published sweep and with direct counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semimoe_fast.evaluation import metrics


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_metrics(case: str, golden) -> None:
    archive = golden("metrics")
    probability = torch.from_numpy(archive[f"{case}/logits"]).softmax(1)[:, 1]
    mask = torch.from_numpy(archive[f"{case}/mask"])
    scores = metrics.score(metrics.count(probability, mask).sum(0))
    assert scores.swept_threshold == archive[f"{case}/best_threshold"]
    assert scores.swept_jaccard == pytest.approx(archive[f"{case}/jaccard"], rel=1e-12)  # quotients of equal integers
    assert scores.swept_dice == pytest.approx(archive[f"{case}/dice"], rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), images=st.integers(1, 3), side=st.integers(1, 9))
def test_counts_equal_direct_counting(seed: int, images: int, side: int) -> None:
    random = torch.Generator().manual_seed(seed)
    # hundredths include the thresholds themselves, which are not foreground
    probability = torch.randint(0, 101, (images, side, side), generator=random) / 100
    mask = torch.randint(0, 2, (images, side, side), generator=random, dtype=torch.uint8) * 255
    counts = metrics.count(probability, mask)
    assert counts.shape == (images, len(metrics.THRESHOLDS), 3)
    for image in range(images):
        for index, threshold in enumerate(metrics.THRESHOLDS):
            predicted = probability[image] > torch.tensor(threshold)
            actual = mask[image] != 0
            expected = [(predicted & actual).sum(), predicted.sum(), actual.sum()]
            assert counts[image, index].tolist() == [int(n) for n in expected]


def test_nan_is_foreground_at_no_threshold() -> None:
    probability = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 0.3]]])
    assert metrics.levels(probability).tolist() == [[[0, 45, 0, 15]]]
    counts = metrics.count(torch.full((1, 4, 4), torch.nan), torch.ones(1, 4, 4))
    assert metrics.score(counts.sum(0)).swept_dice == 0


def test_thresholds_are_the_published_sweep() -> None:
    assert metrics.THRESHOLDS[0] == 0
    assert metrics.THRESHOLDS[-1] == 0.88
    assert metrics.THRESHOLDS[metrics.HALF] == 0.5


def test_empty_prediction_scores_one_on_an_empty_mask_and_zero_on_a_full_mask() -> None:
    empty = torch.zeros(1, 4, 4)
    assert metrics.score(metrics.count(empty, empty).sum(0)).dice == 1
    assert metrics.score(metrics.count(empty, torch.ones(1, 4, 4)).sum(0)).dice == 0
