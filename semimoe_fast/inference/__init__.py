"""Prediction of images of any size, and instances and their polygons from a predicted mask."""

from .folding import folded
from .image import Fields, open_for, predict_image
from .instances import instances_of
from .polygons import geojson, polygons_of

__all__ = ["Fields", "folded", "geojson", "instances_of", "open_for", "polygons_of", "predict_image"]
