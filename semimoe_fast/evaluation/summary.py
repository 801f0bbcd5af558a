"""Means over a set of images and scores of its summed counts, with bootstrap intervals.

Every figure is a quotient of two sums over images: a mean is the sum of the values over the number of images that have
one, and a pooled score a quotient of summed counts. So one matrix, how often each resample draws each image, gives all
resampled figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .images import SCORES, ImageScores

PERCENTILES = 2.5, 97.5  # bounds of the interval
BLOCK = 1 << 22  # entries of the matrix that are in memory at a time


class Estimate(NamedTuple):
    """A figure of a set of images."""

    value: float
    low: float  # bounds of the 95 % interval; NaN if fewer than two images have a value, or all sets are empty
    high: float
    images: int  # that have a value


class Summary(NamedTuple):
    """Figures of a set of images."""

    images: int
    means: dict[str, Estimate]  # over images, by the names of ImageScores; NaN is left out
    pooled: dict[str, Estimate]  # of the counts of the whole set: dice, jaccard (over all pixels) and object_f1


def summarize(scores: ImageScores, resamples: int = 10_000, seed: int = 0) -> Summary:
    """Summarize the scores of N images, each figure with a 95 % interval.

    The interval is the percentile bootstrap: its bounds are the 2.5th and the 97.5th percentile of the figure over
    `resamples` sets of N images, drawn with replacement from the N. The seed fixes the draws.

    Raises ValueError if there are no images, or fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give at least 1")
    if not (images := len(scores.dice)):
        raise ValueError("there are no images to summarize: give the scores of at least one")
    means = {name: _mean(getattr(scores, name).numpy()) for name in SCORES}
    pooled = _pooled(scores)
    quotients = [*means.values(), *pooled.values()]
    numerators, denominators = (np.stack(columns, 1) for columns in zip(*quotients, strict=True))  # (N, figures)
    empty = np.array([np.nan] * len(means) + [1.0] * len(pooled))  # where a sum has no term: no mean, equal empty sets
    values = _quotient(numerators.sum(0), denominators.sum(0), empty)
    sums = [(draws @ numerators, draws @ denominators) for draws in _draws(images, resamples, seed)]
    resampled = _quotient(*map(np.concatenate, zip(*sums, strict=True)), np.nan)
    counted = [int(column.sum()) for _, column in means.values()] + [images] * len(pooled)
    estimates = [
        Estimate(value, *_interval(column, count), count)
        for value, column, count in zip(values.tolist(), resampled.T, counted, strict=True)
    ]
    of_means, of_pooled = estimates[: len(means)], estimates[len(means) :]
    return Summary(images, dict(zip(means, of_means, strict=True)), dict(zip(pooled, of_pooled, strict=True)))


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    defined = ~np.isnan(values)
    return np.where(defined, values, 0), defined.astype(np.float64)


def _pooled(scores: ImageScores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    true_positive, predicted, actual = scores.pixel_counts.double().numpy().T
    found, false, missed = scores.object_counts.double().numpy().T
    return {
        "dice": (2 * true_positive, predicted + actual),
        "jaccard": (true_positive, predicted + actual - true_positive),
        "object_f1": (2 * found, 2 * found + false + missed),
    }


def _quotient(numerator: np.ndarray, denominator: np.ndarray, empty: np.ndarray | float) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), empty)


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample draws each image: float64 (resamples, images), in blocks of resamples."""
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // images)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def _interval(resampled: np.ndarray, count: int) -> tuple[float, float]:
    """Bounds of the interval; resamples without a term, such as those of images without a value, are left out."""
    if count < 2 or np.isnan(resampled).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(resampled, PERCENTILES)
    return float(low), float(high)
