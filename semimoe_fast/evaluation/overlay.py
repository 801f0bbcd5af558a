"""Draw the outlines of masks and instances on their images."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage


def outline(image: np.ndarray, labels: Any, color: tuple[int, int, int] = (0, 255, 0)) -> np.ndarray:
    """A copy of an image, uint8 (H, W, 3), with the inner border of each object drawn one pixel wide.

    labels: mask or label image (H, W), 0 is background. A pixel of an object is in its border if one of its eight
    neighbors has another label, so objects that touch are outlined apart.
    """
    labels = np.asarray(labels)
    border = ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)
    painted = image.copy()
    painted[border & (labels != 0)] = color
    return painted
