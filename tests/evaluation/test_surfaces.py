"""Surface distances against their definition, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semimoe_fast.evaluation import surface_distances


def by_definition(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """hd95 and assd from all distances between the pixels of the surfaces."""
    first, second = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) for mask in (prediction, truth))
    if not len(first) or not len(second):
        return np.nan, np.nan
    distances = np.sqrt(((first[:, None] - second[None]) ** 2).sum(2))
    there, back = distances.min(1), distances.min(0)
    return float(np.percentile(np.concatenate([there, back]), 95)), float(there.mean() + back.mean()) / 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.integers(1, 8),
)
@example(seed=0, shape=(1, 1), block=1)
def test_distances_by_definition(seed: int, shape: tuple[int, int], block: int) -> None:
    """Masks of blocks, at the border too, empty and full ones among them."""
    random = np.random.default_rng(seed)
    coarse = random.random((2, *shape)) < random.choice([0, 0.1, 0.6, 1], (2, 1, 1))
    prediction, truth = np.kron(coarse, np.ones((1, block, block), bool))[:, : shape[0], : shape[1]]
    distances = surface_distances(prediction, truth)
    assert [x.item() for x in distances] == pytest.approx(by_definition(prediction, truth), abs=1e-12, nan_ok=True)


def test_batches_of_any_integers() -> None:
    random = np.random.default_rng(0)
    prediction, truth = random.random((2, 3, 14, 15)) < 0.2
    truth[1] = False
    distances = surface_distances(torch.from_numpy(prediction).long() * -7, truth.astype(np.uint16) * 300)
    expected = torch.tensor([by_definition(*pair) for pair in zip(prediction, truth, strict=True)], dtype=torch.float64)
    assert expected[1].isnan().all()
    torch.testing.assert_close(torch.stack(list(distances), 1), expected, rtol=0, atol=1e-12, equal_nan=True)
    assert [tuple(x.shape) for x in surface_distances(truth[:0], truth[:0])] == [(0,), (0,)]


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"prediction of dtype torch.float32 is ambiguous.*prediction > 0.5"):
        surface_distances(torch.rand(4, 4), torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got shapes \(4, 4\) and \(1, 4, 4\)"):
        surface_distances(np.zeros((4, 4), bool), np.zeros((1, 4, 4), bool))
