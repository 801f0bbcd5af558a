"""Resample images by region: any region of the resampled image equals that region of the whole, bit for bit.

Output pixel i of an axis covers the input around c = (i + 1/2) r, with r = input side / output side. Input pixel j has
the weight of a triangle, max(0, 1 - |j + 1/2 - c| / max(r, 1)), and the weights are divided by their sum; pixels
outside the image have none. This is bilinear interpolation for r <= 1 and an antialiasing filter 2 r pixels wide for
r > 1: the one of Pillow's BILINEAR and of torch's interpolate(mode="bilinear", antialias=True).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array


def weights(source: int, target: int, start: int, count: int) -> tuple[slice, csr_array]:
    """The input pixels that `count` output pixels from `start` on need, and their weights, float32 (count, inputs).

    source and target are the sides of the whole input and output.
    """
    ratio = source / target
    reach = max(ratio, 1.0)
    center = (np.arange(start, start + count) + 0.5) * ratio
    first = np.floor(center - reach).astype(np.int64)
    taps = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = np.maximum(0, 1 - np.abs(taps + 0.5 - center[:, None]) / reach)
    weight[(taps < 0) | (taps >= source)] = 0
    weight = (weight / weight.sum(1, keepdims=True)).astype(np.float32)
    output, tap = weight.nonzero()
    inputs = taps[output, tap]
    begin, end = int(inputs.min()), int(inputs.max()) + 1
    matrix = csr_array((weight[output, tap], (output, inputs - begin)), shape=(count, end - begin))
    return slice(begin, end), matrix


def apply(rows: csr_array, columns: csr_array, pixels: np.ndarray) -> np.ndarray:
    """Weighted sums of pixels, uint8 (H, W, C), over both axes, rounded to uint8 (rows, columns, C)."""
    height, width, channels = pixels.shape
    partial = rows @ pixels.reshape(height, -1).astype(np.float32)
    partial = exchange(partial.reshape(-1, width, channels))  # (W, rows, C)
    output = np.rint(columns @ partial.reshape(width, -1)).astype(np.uint8)
    return exchange(output.reshape(columns.shape[0], -1, channels))


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) at another size (h, w): pixel i of an axis takes the one that holds its center, (i + 1/2) H / h."""
    row, column = (
        (2 * np.arange(target) + 1) * source // (2 * target) for source, target in zip(labels.shape, size, strict=True)
    )
    return labels[row[:, None], column]


def exchange(pixels: np.ndarray) -> np.ndarray:
    """(A, B, C) as a contiguous (B, A, C). torch copies five times as fast as NumPy."""
    return torch.from_numpy(pixels).transpose(0, 1).contiguous().numpy()
