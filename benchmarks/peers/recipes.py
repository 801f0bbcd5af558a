"""Recipes of training: options of `train` that differ from the published recipe, for all methods alike."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "strong": {"lr": 0.1, "stain": 0.1, "brightness": 0.2, "ema": 0.99},
}
