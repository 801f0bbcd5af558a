"""The objects of an instance map as runs: pixels of one object that follow each other in a row.

A map has far fewer runs than pixels, and areas, boxes and overlaps follow from them.
"""

from __future__ import annotations

import numpy as np

from ..data.components import split_mask


class Objects:
    """The N objects of a map, numbered from 0 in the order of their ids.

    image: (H, W) of bool or any integer dtype. A mask, whose foreground has one value alone, is split into 8-connected
    components; otherwise all pixels of one id are one object.
    Raises ValueError for negative ids; `name` is the map in the message.
    """

    def __init__(self, name: str, image: np.ndarray) -> None:
        values, starts, stops = runs(image)
        if (least := values.min(initial=0)) < 0:
            raise ValueError(f"{name} has the id {least}: 0 is background, objects have positive ids")
        ids = np.unique(values[values > 0])
        if (split := split_mask(image, ids)) is not image:
            image = split
            values, starts, stops = runs(image)
            ids = np.unique(values[values > 0])

        self.image, self.ids = image, ids
        number = np.searchsorted(ids, values)
        order = np.flatnonzero(values)
        order = order[np.argsort(number[order], kind="stable")]
        number, starts, stops = number[order], starts[order], stops[order]
        width = max(image.shape[1], 1)
        # (N + 1,): the runs first[k] to first[k + 1] belong to object k
        self.first = np.searchsorted(number, np.arange(len(ids) + 1))
        # of each run; the columns are inclusive
        self.rows, self.left, self.right = starts // width, starts % width, (stops - 1) % width
        self.areas = np.bincount(number, stops - starts, len(ids)).astype(np.int64)  # (N,) pixels
        begin = self.first[:-1]
        sides = (
            np.minimum.reduceat(self.rows, begin),
            np.maximum.reduceat(self.rows, begin),
            np.minimum.reduceat(self.left, begin),
            np.maximum.reduceat(self.right, begin),
        )
        self.boxes = np.stack(sides)  # (4, N): top, bottom, left, right, inclusive

    def __len__(self) -> int:
        return len(self.ids)

    def runs_of(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, leftmost and rightmost column of each run of an object."""
        part = slice(self.first[number], self.first[number + 1])
        return self.rows[part], self.left[part], self.right[part]


def runs(*images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Runs on which all images (H, W) are constant: the value of each image, then first and last + 1 flat index."""
    height, width = images[0].shape
    begins = np.zeros((height, width), bool)
    begins[:, :1] = True
    for image in images:
        begins[:, 1:] |= image[:, 1:] != image[:, :-1]
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], height * width)[: len(starts)]
    return *(image.ravel()[starts] for image in images), starts, stops


def overlaps(predicted: Objects, true: Objects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair of objects that overlap: the number of either, and the pixels that they share."""
    predicted_ids, true_ids, starts, stops = runs(predicted.image, true.image)
    both = (predicted_ids > 0) & (true_ids > 0)
    numbers = [np.searchsorted(x.ids, ids[both]) for x, ids in ((predicted, predicted_ids), (true, true_ids))]
    pairs, index = np.unique(numbers[0] * len(true) + numbers[1], return_inverse=True)
    shared = np.bincount(index, (stops - starts)[both], len(pairs)).astype(np.int64)
    return pairs // len(true), pairs % len(true), shared
