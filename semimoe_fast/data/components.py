"""Tell masks from instance maps in images of integers, and find the objects of a mask."""

from __future__ import annotations

import numpy as np

MOST_PARTS = 3  # of an object; more are rare, even where an image cuts it or resizing tears it


def split_mask(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The instance map of a mask, int32 (H, W): its 8-connected components, numbered from 1.

    labels: (H, W) of bool or any integer dtype; ids: its different values but 0. A foreground of one value alone,
    whichever it is, is a mask. With several values it is an instance map, and is returned as it is.
    """
    return components(labels) if len(ids) == 1 else labels


def components(mask: np.ndarray) -> np.ndarray:
    """The 8-connected components of the non-zero pixels of an image (H, W), int32 (H, W), numbered from 1."""
    from scipy import ndimage  # here, because importing it takes long

    return ndimage.label(mask != 0, np.ones((3, 3)))[0]


def scattered(labels: np.ndarray) -> bool:
    """Whether the values of an image (H, W) are gray values or classes rather than ids of objects.

    Most ids then have more than MOST_PARTS components each; of many ids, evenly chosen ones are looked at.
    """
    ids = np.unique(labels[labels > 0])
    chosen = ids[:: len(ids) // 10 + 1]
    return len(chosen) > 0 and bool(np.median([components(labels == i).max() for i in chosen]) > MOST_PARTS)
