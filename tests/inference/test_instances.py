"""Instances against their definition, and the cases in which there is little to separate."""

from __future__ import annotations

import heapq
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semimoe_fast.errors import UserError
from semimoe_fast.inference import instances_of
from semimoe_fast.inference.instances import depth

pytest.importorskip("skimage", reason="instances need scikit-image")

EIGHT = np.ones((3, 3))


def hills(*centers: tuple[int, int], radius: float = 12, shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    """A field that falls from 1 at each center to 0 at the radius."""
    rows, columns = np.indices(shape)
    return np.max([1 - np.hypot(rows - r, columns - c) / radius for r, c in centers], 0).astype(np.float32)


def test_touching_glands_come_apart_at_the_valley() -> None:
    sdf = hills((20, 20), (20, 40))
    labels = instances_of(sdf > 0, sdf)
    assert labels.dtype == np.int32
    assert labels.max() == 2
    # the watershed gives the middle column to one of the two
    assert (labels[:, :30] == (sdf > 0)[:, :30]).all()
    assert (labels[:, 31:] == 2 * (sdf > 0)[:, 31:]).all()
    assert np.array_equal(labels, instances_of(sdf > 0, 1000 * sdf))  # only the shape of the field counts
    assert instances_of(sdf > 0, sdf, seed_level=0.1).max() == 1  # the valley is at 1 - 10 / 12 = 0.17


def test_every_component_has_its_own_level() -> None:
    """A low pair of hills beside a high one: 0.3 of the highest would be no seed for them."""
    low = 0.2 * hills((20, 14), (20, 28), radius=9)
    labels = instances_of(np.maximum(low, hills((20, 50), radius=9)) > 0, np.maximum(low, hills((20, 50), radius=9)))
    assert labels.max() == 3


def bottlenecks(depth: np.ndarray, mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The largest depth that a path from the seed to each pixel can keep, over 8-neighbors inside the mask."""
    best = np.where(seed, depth, -np.inf)
    queue = [(-depth[pixel], pixel) for pixel in map(tuple, np.argwhere(seed))]
    heapq.heapify(queue)
    while queue:
        height, (row, column) = heapq.heappop(queue)
        for r in range(max(row - 1, 0), min(row + 2, len(mask))):
            for c in range(max(column - 1, 0), min(column + 2, mask.shape[1])):
                reached = min(-height, depth[r, c])
                if mask[r, c] and reached > best[r, c]:
                    best[r, c] = reached
                    heapq.heappush(queue, (-reached, (r, c)))
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), level=st.floats(0, 0.9))
@example(seed=0, shape=(1, 1), level=0.3)
def test_instances_by_definition(seed: int, shape: tuple[int, int], level: float) -> None:
    """Seeds, and a watershed: no other seed reaches a pixel over a shallower valley than the pixel's own."""
    random = np.random.default_rng(seed)
    mask = random.random(shape) < random.choice([0, 0.3, 0.7, 1])
    sdf = ndimage.gaussian_filter(random.standard_normal(shape), 1) + random.choice([-1, 0, 0.1])
    labels = instances_of(mask, sdf, level, least_area=0)
    assert ((labels > 0) == mask).all()
    ids, first = np.unique(labels, return_index=True)
    assert (np.diff(first[ids > 0]) > 0).all()  # numbered in the order of their first pixels

    components, count = ndimage.label(mask, EIGHT)
    for component in (components == k + 1 for k in range(count)):
        seeds, seed_count = ndimage.label(component & (sdf > level * sdf[component].max()), EIGHT)
        ids = np.unique(labels[component])
        assert len(ids) == max(seed_count, 1)
        grown = [bottlenecks(sdf, component, seeds == k + 1) for k in range(seed_count)]
        for k in range(seed_count):
            (own,) = np.unique(labels[seeds == k + 1])
            assert ndimage.label(labels == own, EIGHT)[1] == 1
            assert (grown[k] == np.max(grown, 0))[labels == own].all()


def test_a_component_without_positive_sdf_is_one_instance() -> None:
    mask = np.zeros((9, 20), bool)
    mask[1:8, 1:8] = mask[3:6, 10:20] = True  # the second one touches the border
    for value in (0, -0.5):
        labels = instances_of(mask, np.full(mask.shape, value), least_area=0)
        assert np.array_equal(labels, ndimage.label(mask, EIGHT)[0])
    sdf = np.where(np.arange(20) < 9, -0.5, hills((4, 15), shape=mask.shape))
    assert instances_of(mask, sdf, least_area=0).max() == 2


def test_small_instances_are_dropped() -> None:
    mask = np.zeros((20, 20), bool)
    mask[0, 0] = mask[3:5, 3:5] = mask[10:20, 10:20] = True
    for least_area, expected in ((0, [1, 4, 100]), (2, [4, 100]), (4, [4, 100]), (5, [100]), (101, [])):
        labels = instances_of(mask, mask.astype(np.float32), least_area=least_area)
        assert np.bincount(labels.ravel())[1:].tolist() == expected
    assert instances_of(mask, mask.astype(np.float32)).max() == 1  # 100 pixels by default


def test_thousands_of_instances() -> None:
    mask = np.kron(np.ones((100, 100), bool), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    labels = instances_of(mask, ndimage.distance_transform_edt(mask), least_area=4)
    assert (labels[::3, ::3] == 1 + np.arange(10_000).reshape(100, 100)).all()


def test_values_that_are_not_finite_count_only_inside_the_mask() -> None:
    mask, sdf = np.eye(12, dtype=bool), np.ones((12, 12))
    sdf[0, 1] = np.nan
    assert instances_of(mask, sdf, least_area=0).max() == 1
    for value in (np.nan, np.inf, -np.inf):
        sdf[0, 0] = value
        with pytest.raises(ValueError, match="NaN or inf inside the mask"):
            instances_of(mask, sdf)


def test_bad_arguments_are_refused() -> None:
    for mask, sdf, level, message in (
        (np.ones((2, 3)), np.ones((3, 2)), 0.3, r"of one image, got shapes \(2, 3\) and \(3, 2\)"),
        (np.ones((1, 2, 2)), np.ones((1, 2, 2)), 0.3, r"are \(H, W\)"),
        (np.ones((2, 2)), np.ones((2, 2)), 1, "seed_level is 1: give a number from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            instances_of(mask, sdf, level)


def test_a_component_too_wide_for_distances_names_the_remedy() -> None:
    mask = np.ones((1, 46_342), bool)
    mask[:, 0] = False
    with pytest.raises(UserError, match=r"^a\.png: glands that touch over 46342 x 1 pixels are .* leave out --inst"):
        depth(mask, "a.png")


def test_without_scikit_image_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="is not installed: run `pip install scikit-image`"):
        instances_of(np.ones((2, 2)), np.ones((2, 2)))


def test_unsigned_sdf_is_not_wrapped_around() -> None:
    depth = np.array([[0, 1, 5, 9, 5, 1, 5, 9, 5, 1, 0]], np.uint8)
    expected = instances_of(depth > 0, depth.astype(float), least_area=1)
    assert expected.max() == 2
    assert np.array_equal(instances_of(depth > 0, depth, least_area=1), expected)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
def test_fields_of_any_dtype_are_those_of_their_numbers(dtype):
    random = np.random.default_rng(0)
    for _ in range(20):
        mask, sdf = random.random((12, 14)) < 0.7, random.integers(0, 6, (12, 14)).astype(dtype)
        assert np.array_equal(
            instances_of(mask, sdf, least_area=1), instances_of(mask, sdf.astype(float), least_area=1)
        )
