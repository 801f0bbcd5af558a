"""Metrics over pixels, objects and surfaces, and overlays."""

from .objects import ObjectScores, object_scores
from .surfaces import SurfaceDistances, surface_distances

__all__ = ["ObjectScores", "SurfaceDistances", "object_scores", "surface_distances"]
