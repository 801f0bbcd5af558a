"""Prediction, and instances and their polygons from a predicted mask."""

from .instances import instances_of
from .polygons import geojson, polygons_of

__all__ = ["geojson", "instances_of", "polygons_of"]
