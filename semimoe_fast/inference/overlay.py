"""Draw the outlines of masks and instances on their images."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage


def outline(
    image: np.ndarray, labels: Any, color: tuple[int, int, int] = (0, 255, 0), thickness: int = 1
) -> np.ndarray:
    """A copy of an image, uint8 (H, W, 3), with the inner border of each object drawn `thickness` pixels wide.

    labels: mask or instance map (H, W), an array or a tensor on the CPU, 0 is background. The border of an object is
    its pixels that have one of another label within `thickness` rows and columns, so objects that touch are outlined
    apart.
    """
    labels, side = np.asarray(labels), 2 * thickness + 1
    border = ndimage.maximum_filter(labels, side) != ndimage.minimum_filter(labels, side)
    painted = image.copy()
    painted[border & (labels != 0)] = color
    return painted
