"""Polygons against the label images that they come from: valid, oriented, and exactly as large."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semimoe_fast.inference import geojson, polygons_of

shapely = pytest.importorskip("shapely", reason="reads the polygons back")
pytest.importorskip("skimage", reason="polygons need scikit-image")


def check(labels: np.ndarray) -> dict:
    """Read the GeoJSON of a label image back with Shapely; the collection."""
    collection = json.loads(geojson(labels, "image.png"))
    ids = np.unique(labels[labels > 0])
    rows, columns = np.indices(labels.shape) + 0.5
    drawn = np.zeros_like(labels)
    for label, feature in zip(ids, collection["features"], strict=True):
        assert feature["properties"]["name"] == str(label)
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid, shapely.is_valid_reason(shape)
        assert shape.area == (labels == label).sum()
        for polygon in getattr(shape, "geoms", [shape]):
            assert polygon.exterior.is_ccw  # as the plain plane of x and y has it, RFC 7946
            assert not any(hole.is_ccw for hole in polygon.interiors)
            for ring in (polygon.exterior, *polygon.interiors):
                sides = np.diff(ring.coords, axis=0)
                assert (np.diff(sides != 0, axis=0).any(1)).all()  # every point is a corner
        inside = shapely.contains_xy(shape, columns, rows)
        assert not drawn[inside].any()
        drawn[inside] = label
    assert (drawn == labels).all()
    return collection


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    ids=st.integers(1, 4),
    block=st.integers(1, 2),
)
def test_polygons_give_the_label_image_again(seed: int, shape: tuple[int, int], ids: int, block: int) -> None:
    """Random pixels: parts that touch at corners, holes that touch their outline or each other, nested instances."""
    labels = np.random.default_rng(seed).integers(0, ids + 1, shape)
    check(np.kron(labels, np.ones((block, block), int)))


def read(picture: str) -> np.ndarray:
    return np.array([[int(c) for c in line] for line in picture.split()])


@pytest.mark.parametrize(
    ("picture", "holes"),
    [
        ("1", [0]),
        ("111 111", [0]),
        ("10 01", [0, 0]),  # a corner joins two polygons
        ("111 101 111", [1]),
        ("111 101 110", [1]),  # the hole touches the outline at a corner
        ("1111 1011 1101 1111", [2]),  # two holes that touch
        ("11111 10001 10101 10001 11111", [1, 0]),  # a part inside the hole of another
        ("110 101 011", [0, 0]),  # two parts around a pixel
    ],
)
def test_parts_and_holes(picture: str, holes: list[int]) -> None:
    labels = read(picture)
    check(labels)
    assert [len(polygon) - 1 for polygon in polygons_of(labels)[1]] == holes


def test_corners_of_a_pixel() -> None:
    labels = np.zeros((5, 7), np.uint16)
    labels[3, 5] = 9
    ((ring,),) = polygons_of(labels)[9]
    assert sorted(map(tuple, ring[:-1].tolist())) == [(5, 3), (5, 4), (6, 3), (6, 4)]
    assert ring[0].tolist() == ring[-1].tolist()


def test_many_instances() -> None:
    labels = np.kron(1 + np.arange(2500).reshape(50, 50), np.ones((3, 3), int))
    polygons = polygons_of(labels)
    assert list(polygons) == list(range(1, 2501))
    assert {len(ring) for ((ring,),) in polygons.values()} == {5}


def test_features_are_what_qupath_reads() -> None:
    collection = check(read("1102 0100 0033 0303"))
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Gland"
        assert [0 <= value < 256 for value in feature["properties"]["classification"]["color"]] == [True] * 3
    assert [f["geometry"]["type"] for f in collection["features"]] == ["Polygon", "Polygon", "MultiPolygon"]


def test_ids_are_the_same_every_time_and_differ_between_images() -> None:
    labels = read("1102 0100 0033 0303")
    first, again, other = (
        [uuid.UUID(feature["id"]) for feature in json.loads(geojson(labels, name))["features"]]
        for name in ("a.png", "a.png", "b\udce9.png")
    )
    assert first == again
    assert len({*first, *other}) == 6
