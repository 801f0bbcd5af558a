"""Outlines of instances as polygons along the edges of their pixels, and as GeoJSON.

Pixel (x, y) covers the square from (x, y) to (x + 1, y + 1), so the polygons cover exactly the pixels of an instance.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import naming
from .instances import skimage

Polygon = list[np.ndarray]  # rings: the exterior, then the holes; int64 (N, 2), x and y of the corners, the first twice

CLASSIFICATION = {"name": "Gland", "color": [0, 160, 80]}  # QuPath's class of the annotations
SEPARATORS = ",", ":"
HEAD, TAIL = '{"type":"FeatureCollection","features":[', "]}"  # of the file
NAMESPACE = uuid.UUID("b06502ee-f48a-466f-a8b5-260de546b92a")  # of the features' ids


def polygons_of(labels: Any) -> dict[int, list[Polygon]]:
    """The polygons of each instance of a label image: non-negative integers (H, W), 0 is background.

    Each 4-connected part of an instance is a polygon of its own, so pixels that touch only at a corner are in two
    polygons. Rings do not cross, and touch each other only at single corners, which is valid in the sense of OGC Simple
    Features. The shoelace formula in (x, y) gives a positive area of exteriors and a negative one of holes (RFC 7946).
    Raises UserError if scikit-image is not installed.
    """
    labels = np.asarray(labels)
    found: dict[int, list[Polygon]] = {label: [] for label in np.unique(labels[labels > 0]).tolist()}
    parts: dict[int, Polygon] = {}
    for (row, column), part, ring in _rings(skimage().measure.label(labels, background=0, connectivity=1)):
        if part not in parts:  # the first ring is the exterior
            parts[part] = []
            found[int(labels[row, column])].append(parts[part])
        parts[part].append(ring)
    return found


def geojson(labels: Any, name: str) -> str:
    """A FeatureCollection with one annotation of class Gland for each instance, named after its label.

    QuPath 0.4 and later import it. The ids of the features are UUIDs that depend on `name`, the name of the image, and
    on the coordinates.
    """
    return HEAD + ",".join(_features(labels, name, 0, 0)) + TAIL


class GeojsonFile:
    """The text of `geojson`, written part by part to a file; a context manager. The memory is that of a part."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._file = path.open("w")
        self._between = HEAD

    def write(self, labels: np.ndarray, row: int, column: int) -> None:
        """Add the instances of a part of the label image: (h, w), whose first pixel is at (row, column)."""
        with naming(self.path):
            for feature in _features(labels, self.name, row, column):
                self._file.write(self._between + feature)
                self._between = ","

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with naming(self.path), self._file:
            if kind is None:
                self._file.write((HEAD if self._between == HEAD else "") + TAIL)


def _features(labels: Any, name: str, row: int, column: int) -> Iterator[str]:
    """The features of the instances, as JSON, if the first pixel of the labels is at (row, column) of the image."""
    origin = np.array([column, row])
    for label, polygons in polygons_of(labels).items():
        coordinates: list = [[(ring + origin).tolist() for ring in polygon] for polygon in polygons]
        kind = "MultiPolygon" if len(polygons) > 1 else "Polygon"
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(NAMESPACE, json.dumps([name, coordinates]))),
            "geometry": {"type": kind, "coordinates": coordinates if len(polygons) > 1 else coordinates[0]},
            "properties": {"objectType": "annotation", "name": str(label), "classification": CLASSIFICATION},
        }
        yield json.dumps(feature, separators=SEPARATORS)


def _rings(parts: np.ndarray) -> Iterator[tuple[tuple[int, int], int, np.ndarray]]:
    """The rings of a map (H, W) of 4-connected parts, 0 is background: row and column of a pixel, its part, the ring.

    The exterior of a part comes before its holes.

    An edge is a side of a pixel toward another part, as a key 4 * pixel + direction. The directions are 0 for +x, 1 for
    +y, 2 for -x, 3 for -y, and the pixel is on the side of direction + 1: a turn by +1 goes around the pixel, a turn by
    -1 around a pixel of another part.
    """
    padded = np.pad(parts, 1)
    flat, width = padded.ravel(), padded.shape[1]
    steps = np.array([1, width, -1, -width])
    inside = np.flatnonzero(flat)
    sides = [4 * inside[flat[inside] != flat[inside + steps[d - 1]]] + d for d in range(4)]
    edges = np.sort(np.concatenate(sides))  # the first one of a part is the top of its first pixel, in the exterior
    pixel, direction = edges // 4, edges % 4

    ahead = pixel + steps[direction]
    across = ahead + steps[direction - 1]
    turn_back, straight = (flat[near] == flat[pixel] for near in (across, ahead))
    # Where two pixels of a part touch at a corner only, the rings go around the other two pixels. So no ring
    # touches itself: the part also connects the two pixels elsewhere, which separates the rings.
    after = np.where(straight, 4 * ahead + direction, 4 * pixel + (direction + 1) % 4)
    after = np.searchsorted(edges, np.where(turn_back, 4 * across + (direction - 1) % 4, after))

    order, ring = _cycles(after)
    corner = np.empty(len(edges), bool)  # where the edge begins
    corner[after] = direction != direction[after]
    order, ring = order[corner[order]], ring[corner[order]]
    x = pixel[order] % width - 1 + np.isin(direction[order], (1, 2))
    y = pixel[order] // width - 1 + np.isin(direction[order], (2, 3))
    points, first = np.stack([x, y], 1), np.flatnonzero(np.diff(ring, prepend=-1))
    for start, stop in pairwise([*first, len(ring)]):
        row, column = divmod(int(pixel[ring[start]]), width)
        yield (row - 1, column - 1), int(padded[row, column]), points[[*range(start, stop), start]]


def _cycles(after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a permutation, cycle after cycle, each in its order, and the least element of their cycles.

    Pointer jumping: each round doubles how far every element sees, so a cycle of N elements takes log2 N rounds.
    """
    least, jump = np.arange(len(after)), after
    while (least > least[jump]).any():
        least, jump = np.minimum(least, least[jump]), jump[jump]
    is_least = least == np.arange(len(after))
    distance, jump = np.where(is_least, 0, 1), np.where(is_least, least, after)  # to the least element
    while distance[jump].any():
        distance, jump = distance + distance[jump], jump[jump]
    order = np.lexsort((-distance, least))
    return order, least[order]
