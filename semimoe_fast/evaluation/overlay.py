"""Draw the outlines of masks on their images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .. import functional as F


def outline(
    image: np.ndarray, mask: Tensor, color: tuple[int, int, int] = (0, 255, 0), thickness: float = 1.5
) -> np.ndarray:
    """A copy of an image, uint8 (H, W, 3), with the inner border of a mask (H, W) drawn `thickness` pixels wide."""
    squared = F.squared_distance(mask)
    border = (mask != 0) & (squared > 0) & (squared <= thickness * thickness)
    painted = image.copy()
    painted[border.numpy()] = color
    return painted
