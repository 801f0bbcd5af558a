"""Object scores and surface distances beside what others use, on one CPU thread.

    make bench ARGS="-k objects --benchmark-json=objects.json"

The images are as large as those of GlaS. Predictions are the true glands with displaced outlines, some merged or split,
and with specks where there is no gland. Every peer is checked against ours before it is timed; one that is not
installed is skipped. MONAI is not among them: its hd95 is the larger of the two directed percentiles, not the
percentile of both directions' distances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from semimoe_fast.data.glands import glands
from semimoe_fast.evaluation import object_scores, surface_distances

IMAGES, HEIGHT, WIDTH = 4, 522, 775
EIGHT = np.ones((3, 3))

Pair = tuple[np.ndarray, np.ndarray]  # instance maps (H, W) of prediction and truth


@functools.cache
def pairs() -> list[Pair]:
    random = np.random.default_rng(0)
    masks = glands(IMAGES, WIDTH, seed=0)[1][:, :HEIGHT].numpy()
    noise = ndimage.gaussian_filter(random.standard_normal(masks.shape), (0, 7, 7))
    blurred = ndimage.gaussian_filter(masks.astype(np.float64), (0, 4, 4)) + 0.18 * noise / noise.std()
    maps = [[ndimage.label(mask, EIGHT)[0].astype(np.uint16) for mask in images] for images in (blurred > 0.5, masks)]
    return list(zip(*maps, strict=True))


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------ object scores


def kd_trees(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    """The challenge's MATLAB code as it is ported to Python: masks of whole images and a k-d tree for every pair."""
    maps = prediction, truth
    ids = [np.unique(labels[labels > 0]) for labels in maps]
    true_positives, dice, hausdorff = 0, 0.0, 0.0
    for side in (0, 1):
        these, others = maps[side], maps[1 - side]
        total = (these > 0).sum()
        for number in ids[side]:
            mask = these == number
            weight = mask.sum() / total / 2
            covered = others[mask]
            covered = covered[covered > 0]
            if covered.size:
                best = others == np.bincount(covered).argmax()
                common = (mask & best).sum()
                dice += weight * 2 * common / (mask.sum() + best.sum())
                hausdorff += weight * distance_by_trees(mask, best)
                true_positives += side == 0 and 2 * common > best.sum()
            else:
                hausdorff += weight * min(distance_by_trees(mask, others == other) for other in ids[1 - side])
    return [2 * true_positives / (len(ids[0]) + len(ids[1])), dice, hausdorff]


def distance_by_trees(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.argwhere(a), np.argwhere(b)
    return max(cKDTree(a).query(b)[0].max(), cKDTree(b).query(a)[0].max())


def ours(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    scores = object_scores(prediction, truth)
    return [scores.f1.item(), scores.dice.item(), scores.hausdorff.item()]


@pytest.mark.parametrize("provider", [ours, kd_trees], ids=["ours", "k-d trees"])
def test_object_scores(provider: Callable[..., list[float]], benchmark) -> None:
    measure(provider, ours, benchmark)


# -------------------------------------------------------------------------------------------------- surface distances


def medpy(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    library = pytest.importorskip("medpy.metric.binary")
    directed = library.asd(prediction, truth), library.asd(truth, prediction)
    return [library.hd95(prediction, truth), np.mean(directed)]  # assd pools both directions' distances since 0.5


def scipy_distances(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    first, second = (mask ^ ndimage.binary_erosion(mask) for mask in (prediction > 0, truth > 0))
    there = ndimage.distance_transform_edt(~second)[first]
    back = ndimage.distance_transform_edt(~first)[second]
    return [np.percentile(np.concatenate([there, back]), 95), (there.mean() + back.mean()) / 2]


def our_distances(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    return [x.item() for x in surface_distances(prediction, truth)]


@pytest.mark.parametrize("provider", [our_distances, medpy, scipy_distances], ids=["ours", "medpy", "scipy"])
def test_surface_distances(provider: Callable[..., list[float]], benchmark) -> None:
    measure(provider, our_distances, benchmark)


def measure(provider: Callable[..., list[float]], ours: Callable[..., list[float]], benchmark) -> None:
    """Check a provider on all images, then time it on them one after the other."""
    for pair in pairs():
        assert provider(*pair) == pytest.approx(ours(*pair), rel=1e-9)
    benchmark.pedantic(lambda: [provider(*pair) for pair in pairs()], rounds=3)
    if benchmark.enabled:
        benchmark.extra_info["ms_per_image"] = 1e3 * benchmark.stats["median"] / IMAGES
