"""Object scores against golden files and against their definition, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operations import DLPackArray
from scipy import ndimage

from semimoe_fast.evaluation import object_scores
from semimoe_fast.evaluation.hausdorff import least_squared_hausdorff, squared_hausdorff
from semimoe_fast.evaluation.runs import Objects

EIGHT = np.ones((3, 3))


def cases(archive: dict[str, np.ndarray]) -> list[str]:
    return sorted({key.split("/")[0] for key in archive})


@pytest.mark.parametrize("name", ["objects", "objects_glas"])
def test_golden_scores(name: str, golden) -> None:
    archive = golden(name)
    for case in cases(archive):
        scores = object_scores(archive[f"{case}/prediction"], archive[f"{case}/truth"])
        assert scores.counts.tolist() == [archive[f"{case}/counts"].tolist()]
        # sums of as many terms as there are objects, in another order
        assert scores.f1.item() == pytest.approx(archive[f"{case}/f1"], abs=1e-12)
        assert scores.dice.item() == pytest.approx(archive[f"{case}/dice"], abs=1e-12)
        assert scores.hausdorff.item() == pytest.approx(archive[f"{case}/hausdorff"], abs=1e-10)


def by_definition(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, list[int], float, float]:
    """The scores from sets of pixels and all distances between them. A map of one value is a mask."""
    prediction, truth = (
        ndimage.label(x, EIGHT)[0] if len(np.unique(x[x > 0])) == 1 else x for x in (prediction, truth)
    )
    sides = [{k: np.argwhere(labels == k) for k in np.unique(labels[labels > 0])} for labels in (prediction, truth)]
    shared = {(i, j): int(((prediction == i) & (truth == j)).sum()) for i in sides[0] for j in sides[1]}

    def hausdorff(a: np.ndarray, b: np.ndarray) -> float:
        distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))
        return max(distances.min(1).max(), distances.min(0).max())

    true_positives, dice, distance = 0, 0.0, 0.0
    for side, (these, others) in enumerate((sides, sides[::-1])):
        total = sum(map(len, these.values()))
        for k, pixels in these.items():
            in_common = {m: shared[(k, m) if side == 0 else (m, k)] for m in others}
            best = min(in_common, key=lambda m: (-in_common[m], m)) if any(in_common.values()) else None
            weight = len(pixels) / total / 2
            if best is not None:
                dice += weight * 2 * in_common[best] / (len(pixels) + len(others[best]))
                distance += weight * hausdorff(pixels, others[best])
                true_positives += side == 0 and 2 * in_common[best] > len(others[best])
            else:
                distance += weight * min((hausdorff(pixels, other) for other in others.values()), default=np.nan)
    counts = [true_positives, len(sides[0]) - true_positives, len(sides[1]) - true_positives]
    empty = sum(not side for side in sides)
    if empty:
        return float(empty == 2), counts, float(empty == 2), np.nan
    return 2 * true_positives / (len(sides[0]) + len(sides[1])), counts, dice, distance


def check(scores, expected: tuple[float, list[int], float, float]) -> None:
    f1, counts, dice, hausdorff = expected
    assert scores.counts.tolist() == [counts]
    assert [x.item() for x in (scores.f1, scores.dice, scores.hausdorff)] == pytest.approx(
        [f1, dice, hausdorff], abs=1e-12, nan_ok=True
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    ids=st.integers(2, 9),
    block=st.integers(1, 6),
)
@example(seed=0, shape=(1, 1), ids=2, block=1)
@example(seed=3, shape=(24, 24), ids=9, block=1)  # objects scattered over many places
@example(seed=1, shape=(24, 23), ids=9, block=6)
def test_scores_by_definition(seed: int, shape: tuple[int, int], ids: int, block: int) -> None:
    """Blocks of ids, shifted against each other: matched, unmatched, touching, at the border, or no objects."""
    random = np.random.default_rng(seed)
    coarse = random.integers(2, ids + 1, shape) * (random.random(shape) < random.random())
    tiles = np.kron(coarse, np.ones((block, block), np.int64))
    prediction, truth = tiles[: shape[0], : shape[1]], tiles[-shape[0] :, -shape[1] :]
    truth = np.where(random.random(shape) < 0.2 * random.random(), random.integers(0, 9, shape), truth)
    check(object_scores(prediction, truth), by_definition(prediction, truth))


def test_the_search_finds_the_least_distance(golden) -> None:
    archive = golden("objects")
    case = "synthetic_2_1"
    prediction, truth = Objects("p", archive[f"{case}/prediction"]), Objects("t", archive[f"{case}/truth"])
    for these, others in ((prediction, truth), (truth, prediction)):
        for i in range(len(these)):
            all_distances = [squared_hausdorff(these, i, others, j) for j in range(len(others))]
            assert least_squared_hausdorff(these, i, others) == min(all_distances)


def test_masks_are_split_into_8_connected_components() -> None:
    random = np.random.default_rng(0)
    prediction, truth = random.random((2, 2, 40, 30)) < 0.3
    expected = [
        by_definition(*(ndimage.label(x, EIGHT)[0] for x in pair)) for pair in zip(prediction, truth, strict=True)
    ]
    for cast in (
        lambda mask: mask,
        lambda mask: torch.from_numpy(mask).long(),
        lambda mask: mask.astype(np.uint8) * 255,
    ):
        scores = object_scores(cast(prediction), cast(truth))
        for image, values in enumerate(expected):
            check(type(scores)(*(x[image : image + 1] for x in scores)), values)


def test_one_id_in_two_places_is_one_object() -> None:
    labels = np.zeros((12, 12), np.int32)
    labels[1:3, 1:3] = labels[8:11, 8:11] = 7
    labels[5, 5] = 8
    scores = object_scores(labels, labels)
    assert scores.counts.tolist() == [[2, 0, 0]]
    half = np.where(np.arange(12)[:, None] < 6, labels, 0)
    check(object_scores(half, labels), by_definition(half, labels))


@pytest.mark.parametrize(("dtype", "value"), [("u1", 128), ("u2", 65535), (">u2", 300), ("i8", 7), ("u8", 2**64 - 1)])
def test_any_single_value_makes_a_mask(dtype: str, value: int) -> None:
    mask = np.zeros((12, 12), dtype)
    mask[1:3, 1:3] = mask[3:5, 3:5] = mask[8:11, 8:11] = value  # two of the squares share a corner
    expected = object_scores(mask != 0, mask != 0)
    assert expected.counts.tolist() == [[2, 0, 0]]
    assert all(map(torch.equal, object_scores(mask, mask), expected))


def test_empty_maps() -> None:
    """Neither map, one map, no image, no pixel."""
    one = torch.zeros(3, 5, 6, dtype=torch.int64)
    one[1:, 2, 3] = 1
    scores = object_scores(one, torch.stack([one[0], one[0], one[1]]))
    assert scores.f1.tolist() == scores.dice.tolist() == [1, 0, 1]
    assert scores.counts.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    torch.testing.assert_close(scores.hausdorff, torch.tensor([torch.nan, torch.nan, 0]).double(), equal_nan=True)
    none = object_scores(one[:0], one[:0])
    assert [tuple(x.shape) for x in none] == [(0,), (0, 3), (0,), (0,)]
    assert object_scores(one[:, :0], one[:, :0]).f1.tolist() == [1, 1, 1]


def test_ids_of_every_integer_type(golden) -> None:
    archive = golden("objects")
    prediction, truth = (archive[f"synthetic_3_0/{name}"].astype(np.int64) for name in ("prediction", "truth"))
    expected = object_scores(prediction, truth)

    def same(a: object, b: object) -> bool:
        return all(torch.equal(x, y) for x, y in zip(object_scores(a, b), expected, strict=True))

    for dtype, largest in (
        (np.int32, 2**31 - 1),
        (np.uint32, 2**32 - 1),
        (np.int64, 2**63 - 1),
        (np.uint64, 2**64 - 1),
    ):
        high = dtype(largest) - truth.max().astype(dtype) + truth.astype(dtype)
        assert same(prediction.astype(dtype), np.where(truth > 0, high, dtype(0)))
    for array in (prediction.astype(np.uint8), prediction.astype(np.int16), np.asfortranarray(prediction)):
        assert same(array, DLPackArray(truth))
    assert same(torch.from_numpy(prediction.astype(np.uint32)), torch.from_numpy(truth.T.copy()).T)


def test_thousands_of_objects() -> None:
    """A grid of 40 x 50 objects; every second row of them has no counterpart and is nearest to the row below it."""
    grid = np.zeros((40, 8, 50, 8), np.int32)
    grid[:, 2:4, :, 2:5] = 1 + np.arange(2000).reshape(40, 1, 50, 1)
    truth = grid.copy()
    truth[1::2] = 0
    scores = object_scores(grid.reshape(320, 400), truth.reshape(320, 400))
    assert scores.counts.tolist() == [[1000, 1000, 0]]
    assert scores.dice.item() == pytest.approx(0.75)
    assert scores.hausdorff.item() == pytest.approx(0.5 * 0.5 * 8)


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), int), TypeError, "prediction of dtype float32 is ambiguous"),
        (np.zeros((4, 4), int), torch.zeros(4, 4, dtype=torch.bfloat16), TypeError, "truth of dtype torch.bfloat16"),
        (np.full((4, 4), -3), np.zeros((4, 4), int), ValueError, "prediction has the id -3: 0 is background"),
        (np.zeros((4, 4), int), np.zeros((4, 5), int), ValueError, r"got shapes \(4, 4\) and \(4, 5\)"),
        (np.zeros(4, int), np.zeros(4, int), ValueError, r"\(B, H, W\) or \(H, W\), got shape \(4,\)"),
        ([[0]], np.zeros((1, 1), int), TypeError, r"got list: use np.asarray\(prediction\)"),
    ],
    ids=["float", "bfloat16", "negative", "shapes", "ndim", "list"],
)
def test_bad_input(prediction: object, truth: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        object_scores(prediction, truth)
    assert "\n" not in str(caught.value)
