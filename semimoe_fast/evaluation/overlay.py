"""Draw the outlines of masks and instances on their images."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def outline(image: np.ndarray, labels: np.ndarray, color: tuple[int, int, int] = (0, 255, 0)) -> np.ndarray:
    """A copy of an image, uint8 (H, W, 3), with the inner border of each object drawn one pixel wide.

    labels: mask or label image (H, W), 0 is background. The border of an object are its pixels that have one of another
    label among their eight neighbors, so objects that touch are outlined apart.
    """
    labels = np.asarray(labels)
    border = ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)
    painted = image.copy()
    painted[border & (labels != 0)] = color
    return painted
