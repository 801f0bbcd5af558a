"""Instances of pieces of rows against those of the whole image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semimoe_fast import functional as F
from semimoe_fast.data.glands import picture
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


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label images differ in the numbers alone."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def smooth(seed: int, shape: tuple[int, int], level: float, blur: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """The mask and field of thresholded smooth noise."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), blur)
    field = (field / field.std() - level).astype(np.float32)
    return field > 0, field


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    piece=st.integers(1, 60),
    level=st.floats(-1, 1.5),
    with_sdf=st.booleans(),
)
def test_components_are_separated_as_in_the_whole_image(
    seed: int, shape: tuple[int, int], piece: int, level: float, with_sdf: bool
) -> None:
    mask, sdf = smooth(seed, shape, level)
    expected = instances_of(mask, sdf if with_sdf else depth(mask), least_area=5)
    assert same_partition(stitched(mask, sdf if with_sdf else None, piece, tall=shape[0]), expected)
