"""The Hausdorff distance of two objects, and the least one to any object of a map: exact, in pixels squared."""

from __future__ import annotations

import numpy as np
import torch

from .. import functional as F
from .runs import Objects

UNLIMITED = np.iinfo(np.int64).max
ANCHORS = 16  # pixels of an object that bound the distance to it from above


def squared_hausdorff(these: Objects, i: int, others: Objects, j: int) -> int:
    """Compute it with one distance transform of each object, in the box that holds both."""
    top, bottom, left, right = _common_box(these, i, others, j)
    crop = slice(top, bottom + 1), slice(left, right + 1)
    pair = np.stack([others.image[crop] == others.ids[j], these.image[crop] == these.ids[i]])
    to_nearest = F.squared_distance(torch.from_numpy(pair)).numpy()  # of pixels outside an object: to its nearest
    return int(to_nearest[pair[::-1] > pair].max(initial=0))


def least_squared_hausdorff(these: Objects, i: int, others: Objects) -> int:
    """The least squared Hausdorff distance from an object to any of the other map, which has at least one.

    Where a side of two boxes is d pixels apart, one object has a pixel at least d from all pixels of the other. This
    orders the candidates and ends the search.
    """
    bounds = np.abs(others.boxes - these.boxes[:, i, None]).max(0) ** 2
    nearest = int(bounds.argmin())
    least = _distant(these, i, others, nearest)
    bounds[nearest] = least
    closer = np.flatnonzero(bounds < least)
    for j in closer[np.argsort(bounds[closer])].tolist():
        if bounds[j] >= least:
            break
        least = min(least, _distant(these, i, others, j, least))
    return least


def _farthest_from_box(objects: Objects, number: int, box: list[int]) -> int:
    """The largest squared distance of a pixel to a box. That distance is convex, so only the ends of runs count."""
    rows, left, right = objects.runs_of(number)
    top, bottom, first, last = box
    across = np.maximum(np.maximum(first - left, right - last), 0)
    along = np.maximum(np.maximum(top - rows, rows - bottom), 0)
    return int((across**2 + along**2).max())


def _distant(these: Objects, i: int, others: Objects, j: int, limit: int = UNLIMITED) -> int:
    """The squared Hausdorff distance if it is below the limit, else a lower bound of it that is at least the limit.

    A pixel's distance to the other object is at least that to its box. Only pixels that may be farther from the other
    object than such a bound are looked at, and few are.
    """
    bound = max(
        _farthest_from_box(these, i, others.boxes[:, j].tolist()),
        _farthest_from_box(others, j, these.boxes[:, i].tolist()),
    )
    if bound >= limit:
        return bound
    top, bottom, first, last = _common_box(these, i, others, j)
    area = (bottom - top + 1) * (last - first + 1)
    for source, a, target, b in ((these, i, others, j), (others, j, these, i)):
        rows, left, right = _runs_beyond(source, a, target, b, bound)
        target_rows, target_left, target_right = (x[:, None] for x in target.runs_of(b))
        lengths = right - left + 1
        pixels = int(lengths.sum())
        if pixels * len(target_rows) > area:  # then distance transforms of the box cost less
            return squared_hausdorff(these, i, others, j)
        if pixels:
            y = np.repeat(rows, lengths)
            x = np.arange(pixels) + np.repeat(left - np.cumsum(lengths) + lengths, lengths)
            across = np.maximum(np.maximum(target_left - x, x - target_right), 0)
            bound = max(bound, int((across**2 + (target_rows - y) ** 2).min(0).max()))
    return bound


def _runs_beyond(source: Objects, a: int, target: Objects, b: int, bound: int) -> tuple[np.ndarray, ...]:
    """The runs of object a that may have a pixel whose squared distance to object b exceeds the bound.

    The distance to one pixel of b is largest at an end of the run, and the distance to b is no larger.
    """
    rows, left, right = source.runs_of(a)
    anchor_rows, anchor_left, _ = target.runs_of(b)
    step = -(-len(anchor_rows) // ANCHORS)
    anchor_rows, anchor_columns = anchor_rows[::step, None], anchor_left[::step, None]
    across = np.maximum(np.abs(left - anchor_columns), np.abs(right - anchor_columns))
    beyond = (across**2 + (rows - anchor_rows) ** 2).min(0) > bound
    return rows[beyond], left[beyond], right[beyond]


def _common_box(these: Objects, i: int, others: Objects, j: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the box that holds both objects, inclusive."""
    (top, bottom, left, right), box = these.boxes[:, i].tolist(), others.boxes[:, j].tolist()
    return min(top, box[0]), max(bottom, box[1]), min(left, box[2]), max(right, box[3])
