"""Instances of pieces of rows against those of the whole image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semimoe_fast.inference import geojson, instances_of
from semimoe_fast.inference.instances import depth
from semimoe_fast.inference.polygons import GeojsonFile
from semimoe_fast.inference.stitching import Stitcher

pytest.importorskip("skimage", reason="instances need scikit-image")


def stitched(mask: np.ndarray, sdf: np.ndarray | None, piece: int, tall: int, least_area: int = 5) -> np.ndarray:
    """The label image from pieces of rows, which agrees with what is reported of each component."""
    painted = np.zeros(mask.shape, np.int64)
    seen = []

    def found(labels: np.ndarray, row: int, column: int) -> None:
        place = painted[row : row + labels.shape[0], column : column + labels.shape[1]]
        assert not place[labels > 0].any()
        place[labels > 0] = labels[labels > 0]
        numbers, first = np.unique(labels[labels > 0], return_index=True)
        assert (np.diff(first) > 0).all()
        seen.extend(numbers.tolist())

    stitcher = Stitcher(mask.shape, found, least_area=least_area, tall=tall)
    rows = []
    for start in range(0, len(mask), piece):
        part = slice(start, start + piece)
        rows.append(stitcher.add(mask[part], None if sdf is None else sdf[part]))
        done = sum(map(len, rows))
        assert start + piece - done <= tall + piece + 1 or start + piece >= len(mask)
    labels = np.concatenate(rows)
    assert labels.dtype == np.uint32
    assert np.array_equal(labels, painted)
    assert seen == list(range(1, stitcher.count + 1))
    return painted


def agreement(found: np.ndarray, expected: np.ndarray) -> tuple[int, int]:
    """Instances of one label image that cover exactly the same pixels as one of the other, and those of either."""
    pairs, both = np.unique(found.ravel().astype(np.int64) << 32 | expected.ravel(), return_counts=True)
    ours, theirs = pairs >> 32, pairs & 0xFFFF_FFFF
    a, b = np.bincount(found.ravel()), np.bincount(expected.ravel())
    same = int(((both == a[ours]) & (both == b[theirs]) & (ours > 0) & (theirs > 0)).sum())
    return same, max(np.count_nonzero(a[1:]), np.count_nonzero(b[1:]))


def smooth(seed: int, shape: tuple[int, int], level: float, blur: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """The mask and field of thresholded smooth noise, in which no two values are the same."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), blur)
    field = field / np.abs(field).mean() - level
    return field > 0, field


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    piece=st.integers(1, 60),
    level=st.floats(-1, 1.5),
)
def test_components_are_separated_as_in_the_whole_image(
    seed: int, shape: tuple[int, int], piece: int, level: float
) -> None:
    mask, sdf = smooth(seed, shape, level)
    same, count = agreement(stitched(mask, sdf, piece, tall=shape[0]), instances_of(mask, sdf, least_area=5))
    assert same == count


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    piece=st.integers(1, 60),
    level=st.floats(-1, 1.5),
)
def test_depth_is_that_of_the_whole_image(seed: int, shape: tuple[int, int], piece: int, level: float) -> None:
    """Depths are often equal, and then the watershed may give a pixel to another instance."""
    mask, _ = smooth(seed, shape, level)
    found, expected = stitched(mask, None, piece, shape[0], 0), instances_of(mask, depth(mask), least_area=0)
    assert np.array_equal(found > 0, expected > 0)
    assert found.max() == expected.max()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16), piece=st.integers(1, 40), tall=st.integers(4, 40), level=st.sampled_from([-9, -0.5, 0])
)
def test_tall_components_are_cut_and_no_pixel_is_lost(seed: int, piece: int, tall: int, level: float) -> None:
    """`stitched` checks that the window stays short."""
    mask, sdf = smooth(seed, (150, 30), level)
    assert np.array_equal(stitched(mask, sdf, piece, tall, least_area=0) > 0, mask)


@pytest.mark.parametrize(
    ("side", "blur", "level", "tall", "most_others"),
    [
        (700, 5, 0.9, 1024, 0),
        (700, 5, 0, 128, 0.3),  # half of the image is one component, and its highest peak leaves the window: 95 of 395
        pytest.param(4000, 8, 0.9, 1024, 0, marks=pytest.mark.slow),
        pytest.param(4000, 8, 0, 1024, 0.15, marks=pytest.mark.slow),  # 539 of 5,209
    ],
)
def test_large_image(side: int, blur: float, level: float, tall: int, most_others: float) -> None:
    mask, sdf = smooth(0, (side, side), level, blur)
    expected = instances_of(mask, sdf)
    same, count = agreement(stitched(mask, sdf, 200, tall, least_area=100), expected)
    print(f"{same} of {count} instances are the same")
    assert expected.max() > side**2 / 10_000
    assert count - same <= most_others * count


def test_polygons_are_those_of_the_whole_image(tmp_path: Path) -> None:
    """A component is written once, at its place in the image."""
    mask, sdf = smooth(0, (200, 150), 0.5, 4)
    with GeojsonFile(tmp_path / "a", "a.png") as file:
        stitcher = Stitcher(mask.shape, file.write)
        for start in range(0, 200, 30):
            stitcher.add(mask[start : start + 30], sdf[start : start + 30])
    found, expected = (json.loads(x) for x in ((tmp_path / "a").read_text(), geojson(instances_of(mask, sdf), "a.png")))
    numbers = range(1, stitcher.count + 1)
    for collection in (found, expected):
        assert [feature["properties"].pop("name") for feature in collection["features"]] == [str(n) for n in numbers]
    by_id = lambda collection: {feature["id"]: feature for feature in collection["features"]}  # noqa: E731
    assert by_id(found) == by_id(expected)
    assert len(numbers) == len(by_id(found)) > 10
    with GeojsonFile(tmp_path / "b", "b.png"):
        pass
    assert (tmp_path / "b").read_text() == geojson(np.zeros((3, 3), int), "b.png")


def valleys(rows, every):
    """A mask of 9 columns, and a field with a valley after `every` rows."""
    mask = np.zeros((rows, 11), bool)
    mask[:, 1:10] = True
    field = np.where(np.arange(rows) % every < every - 1, 1, 0.1)
    return mask, np.broadcast_to(field[:, None], mask.shape).astype(np.float32)


def test_the_tallest_component_that_is_separated_as_a_whole(tmp_path):
    """It ends with a window: in parts, a seed level of its own would split its lower half again."""
    mask, sdf = valleys(16, 4)
    calls = []
    stitcher = Stitcher((20, 11), lambda *found: calls.append(found), least_area=1, tall=16)
    stitcher.add(mask, sdf)
    assert not calls
    stitcher.add(np.zeros((4, 11), bool), np.zeros((4, 11), np.float32))
    assert len(calls) == 1


def test_a_quarter_of_a_tall_component_stays_in_the_window():
    mask, sdf = valleys(60, 4)
    stitcher = Stitcher((60, 11), lambda *_: None, least_area=1, tall=16)
    stitcher.add(mask[:20], sdf[:20])
    assert stitcher.count == 4  # of 5; the last 4 rows are those of one
