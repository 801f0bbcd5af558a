"""Metrics over pixels, objects and surfaces, and their summary over a set of images."""

from .images import ImageScores, score_images
from .objects import ObjectScores, object_scores
from .summary import Estimate, Summary, summarize
from .surfaces import SurfaceDistances, surface_distances

__all__ = [
    "Estimate",
    "ImageScores",
    "ObjectScores",
    "Summary",
    "SurfaceDistances",
    "object_scores",
    "score_images",
    "summarize",
    "surface_distances",
]
