"""Scores of images of any size, and figures of a set against a loop over the same resamples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semimoe_fast.evaluation import ImageScores, object_scores, score_images, summarize, summary, surface_distances
from semimoe_fast.evaluation.images import SCORES


def random_scores(images: int, seed: int = 0) -> ImageScores:
    """Scores of images, some of which have no distances."""
    random = np.random.default_rng(seed)
    columns = [torch.from_numpy(random.random(images)) for _ in SCORES]
    for column in columns[-3:]:
        column[:: max(2, images // 3)] = torch.nan
    pixels = np.sort(random.integers(0, 100, (images, 3)), 1)  # true positives are the fewest
    return ImageScores(*columns, torch.from_numpy(pixels), torch.from_numpy(random.integers(0, 9, (images, 3))))


def by_loop(scores: ImageScores, draws: np.ndarray) -> dict[str, tuple[float, float]]:
    """The bounds of the interval of every figure."""
    tp, predicted, actual = scores.pixel_counts.numpy().T
    found, false, missed = scores.object_counts.numpy().T
    figures = {name: [np.nanmean(getattr(scores, name).numpy()[draw]) for draw in draws] for name in SCORES}
    figures["pooled dice"] = [2 * tp[d].sum() / (predicted[d].sum() + actual[d].sum()) for d in draws]
    figures["pooled jaccard"] = [tp[d].sum() / (predicted[d].sum() + actual[d].sum() - tp[d].sum()) for d in draws]
    figures["pooled object_f1"] = [2 * found[d].sum() / (2 * found + false + missed)[d].sum() for d in draws]
    return {name: tuple(np.nanpercentile(values, [2.5, 97.5])) for name, values in figures.items()}


def test_intervals_equal_a_loop_over_the_same_draws() -> None:
    images, resamples = 12, 300
    scores = random_scores(images)
    found = summarize(scores, resamples, seed=5)
    draws = np.random.default_rng(5).integers(0, images, (resamples, images))
    expected = by_loop(scores, draws)
    figures = found.means | {f"pooled {name}": estimate for name, estimate in found.pooled.items()}
    assert figures.keys() == expected.keys()
    for name, estimate in figures.items():
        # sums of twelve terms in another order
        assert (estimate.low, estimate.high) == pytest.approx(expected[name], abs=1e-12)
        assert estimate.low < estimate.value < estimate.high


def test_undefined_values_are_left_out_of_means_and_counted() -> None:
    scores = random_scores(10)
    found = summarize(scores, 100)
    assert found.images == found.means["dice"].images == 10
    hd95 = scores.hd95.numpy()
    assert found.means["hd95"].value == pytest.approx(np.nanmean(hd95))
    assert found.means["hd95"].images == np.isfinite(hd95).sum() < 10


def test_blocks_of_resamples_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(7)
    whole = summarize(scores, 100)
    monkeypatch.setattr(summary, "BLOCK", 7 * 30)
    blocks = summarize(scores, 100)
    for name in SCORES:
        # a product with fewer rows may add in another order
        assert blocks.means[name] == pytest.approx(whole.means[name], abs=1e-12)


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(0.7, 0.1, 200))
    scores = random_scores(200)._replace(dice=values)
    estimate = summarize(scores).means["dice"]
    error = float(values.std()) / 200**0.5
    # 10,000 resamples: the percentiles are within about 2 percent, and 200 images are nearly normal
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_too_few_images_have_no_interval() -> None:
    one = summarize(random_scores(1), 10)
    assert np.isnan([one.means["dice"].low, one.pooled["dice"].high]).all()
    assert np.isnan(one.means["hd95"].value)
    assert one.means["hd95"].images == 0
    with pytest.raises(ValueError, match="at least one"):
        summarize(score_images([], []))


def test_empty_masks_score_one() -> None:
    empty = torch.zeros(2, 5, 5, dtype=torch.bool)
    found = summarize(score_images(empty, empty), 10)
    assert [estimate.value for estimate in found.pooled.values()] == [1, 1, 1]
    assert [found.means[name].value for name in SCORES[:4]] == [1, 1, 1, 1]
    assert np.isnan([(estimate.low, estimate.high) for estimate in found.pooled.values()]).all()


def test_resamples_of_empty_images_alone_are_left_out_of_pooled_intervals() -> None:
    truth = np.zeros((4, 2, 10), np.int32)
    truth[0] = [[1] * 10, [0] * 10]
    prediction = np.where(np.arange(10) < 6, truth, 0)
    found = summarize(score_images(prediction, truth), 200)
    for name, value in (("dice", 0.75), ("jaccard", 0.6), ("object_f1", 1)):
        estimate = found.pooled[name]
        assert (estimate.low, estimate.value, estimate.high) == pytest.approx((value,) * 3)


def test_at_least_one_resample() -> None:
    with pytest.raises(ValueError, match="resamples is 0: give at least 1"):
        summarize(random_scores(3), 0)


def test_images_of_different_sizes_are_scored_one_by_one() -> None:
    random = np.random.default_rng(2)
    maps = [(random.integers(0, 4, size), random.integers(0, 4, size)) for size in ((20, 30), (17, 9))]
    scores = score_images(*zip(*maps, strict=True))
    for i, (prediction, truth) in enumerate(maps):
        objects, surfaces = object_scores(prediction, truth), surface_distances(prediction, truth)
        assert scores.object_counts[i].tolist() == objects.counts[0].tolist()
        expected = (objects.f1, objects.dice, objects.hausdorff, surfaces.hd95, surfaces.assd)
        assert [column[i].item() for column in scores[2:7]] == [column.item() for column in expected]
        both, either = ((prediction > 0) & (truth > 0)).sum(), ((prediction > 0) | (truth > 0)).sum()
        assert scores.jaccard[i].item() == both / either
        assert scores.dice[i].item() == 2 * both / ((prediction > 0).sum() + (truth > 0).sum())
        assert scores.pixel_counts[i].tolist() == [both, (prediction > 0).sum(), (truth > 0).sum()]


def test_each_prediction_needs_a_truth() -> None:
    mask = np.ones((3, 3), bool)
    with pytest.raises(ValueError, match="shorter"):
        score_images([mask, mask], [mask])


def test_items_are_single_images() -> None:
    """Lists of batches, as loaders give them, would get one Dice for a batch and one F1 for an image."""
    random = np.random.default_rng(0)
    predictions, truths = random.integers(0, 3, (2, 4, 9, 9))
    with pytest.raises(ValueError, match=r"one image \(H, W\), got shape \(2, 9, 9\): join batches to \(N, H, W\)"):
        score_images(np.split(predictions, 2), np.split(truths, 2))
