"""Tiles: weights, equality with the untiled network, shifts of the grid, background, resizing and memory."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.augment import normalize
from semimoe_fast.data.readers import ArrayReader
from semimoe_fast.inference import folded, predict_image
from semimoe_fast.inference.image import eightfold, is_slide, mismatch
from semimoe_fast.inference.tiles import axis, in_tiles, is_empty, overlap_of, resized
from semimoe_fast.model import SemiMoE

CPU = torch.device("cpu")
CROPS = Preprocessing(64, (0.5,) * 3, (0.2,) * 3, sampling="crops")
FIELDS = ("probability", "sdf", "boundary")


def noise(height: int, width: int, blur: float = 0.0) -> np.ndarray:
    """An image of blurred noise, uint8 (H, W, 3)."""
    values = np.random.default_rng(0).standard_normal((height, width, 3))
    if blur:
        values = ndimage.gaussian_filter(values, (blur, blur, 0)) * 2 * math.sqrt(math.pi) * blur
    return (values * 50 + 128).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> SemiMoE:
    """Random weights, and statistics of batch normalization that fit them."""
    torch.manual_seed(0)
    model = SemiMoE(width=2)
    image = normalize(torch.from_numpy(noise(128, 128, blur=4)).permute(2, 0, 1)[None], CROPS.mean, CROPS.std)
    with torch.no_grad():
        for _ in range(30):
            model(image)
    return model.eval()


def whole(pieces) -> list[Tensor]:
    """The fields of all rows of an image; pieces follow each other without gaps."""
    pieces = list(pieces)
    heights = [piece.probability.shape[0] for _, piece in pieces]
    assert [row for row, _ in pieces] == [0, *itertools.accumulate(heights)][:-1]
    fields = zip(*(piece for _, piece in pieces), strict=True)
    return [torch.cat(parts) for parts in fields if parts[0] is not None]


@pytest.mark.parametrize("tile", [16, 48, 64, 512, 1024])
def test_weights_are_a_partition_of_unity(tile: int) -> None:
    for length in (1, 15, tile - 1, tile, tile + 1, 2 * tile, 5 * tile + 7):
        total = torch.zeros(length)
        tiles = axis(length, tile)
        for start, weights in tiles:
            assert len(weights) == min(tile, length)
            assert weights.min() > 0
            total[start : start + len(weights)] += weights
        assert (total - 1).abs().max() < 1e-6  # float32 rounds 1 to 6e-8
        starts = [start for start, _ in tiles]
        assert all(start % 16 == 0 for start in starts[:-1])
        assert all(b - a <= tile - overlap_of(tile) for a, b in itertools.pairwise(starts))
    assert torch.equal(axis(tile, tile)[0][1], torch.ones(tile))


@pytest.mark.parametrize("tile", [0, -16, 8, 100])
def test_side_of_a_tile_is_a_multiple_of_16(tile: int, model: SemiMoE) -> None:
    with pytest.raises(ValueError, match=f"the side of a tile is {tile}: give a positive multiple of 16"):
        list(predict_image(model, noise(20, 20), CROPS, tile=tile))


@pytest.mark.parametrize("size", [(64, 64), (50, 61), (1, 30)])
def test_image_of_one_tile_equals_the_untiled_forward_bit_for_bit(size: tuple[int, int], model: SemiMoE) -> None:
    image, fast = noise(*size), folded(model)
    found = whole(predict_image(fast, image, CROPS, fields=FIELDS, tile=64))
    with torch.no_grad():
        images = normalize(torch.from_numpy(image).permute(2, 0, 1)[None], CROPS.mean, CROPS.std)
        mask, sdf, boundary, _ = fast.gating([expert.features(images) for expert in fast.experts])
    assert torch.equal(found[0], mask.softmax(1)[0, 1])
    assert torch.equal(found[1], sdf.tanh()[0, 0])
    assert torch.equal(found[2], boundary.softmax(1)[0, 1])


@pytest.mark.parametrize("preprocessing", [CROPS, CROPS._replace(sampling="resize")])
def test_mirrored_and_read_only_arrays_are_predicted(preprocessing: Preprocessing, model: SemiMoE) -> None:
    image = noise(50, 61)
    mirrored = image[..., ::-1]  # from BGR
    mirrored.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        found, expected = (whole(predict_image(model, x, preprocessing)) for x in (mirrored, mirrored.copy()))
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(("size", "tile"), [((150, 333), 64), ((65, 40), 64), ((200, 97), 48)])
def test_tiles_of_a_pointwise_function_give_the_function(size: tuple[int, int], tile: int) -> None:
    """Every pixel is read once."""
    image = ArrayReader(noise(*size))
    rows: list[int] = []

    def read(row: int, column: int, height: int, width: int, read: Callable = image.read) -> np.ndarray:
        assert (column, width) == (0, size[1])
        rows.extend(range(row, row + height))
        return read(row, column, height, width)

    image.read = read
    pieces = in_tiles(image, lambda pixels: pixels[:, :2].float(), (0, 0), CPU, tile, batch=3)
    found = torch.cat([fields for _, fields in pieces], 1)
    assert rows == list(range(size[0]))
    expected = torch.from_numpy(image.pixels).permute(2, 0, 1)[:2].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # the weights sum to 1 up to 1e-7, times 255


def test_shift_of_the_grid_changes_probabilities_little(model: SemiMoE) -> None:
    """The tiles see 48 rows less, and each pixel lies elsewhere in its tile. Random weights see far: trained networks
    change by less, see docs/prediction.md."""
    image, shift, tile = noise(1664, 96, blur=4), 48, 512
    before, after = (whole(predict_image(model, x, CROPS, tile=tile))[0] for x in (image, image[shift:]))
    change = (before[shift:] - after).abs()[tile:-tile]  # away from the border, which the shift cuts
    assert before.std() > 0.02
    assert 0 < change.max() < 0.2
    assert change.mean() < 0.005


def test_background_is_skipped_by_its_rule(model: SemiMoE) -> None:
    rng = np.random.default_rng(0)
    glass = (rng.standard_normal((40, 70, 3)) * 12 + 240).clip(0, 255).astype(np.uint8)  # noise is averaged
    assert is_empty(torch.from_numpy(glass).permute(2, 0, 1))
    assert is_empty(torch.full((3, 3, 90), 220, dtype=torch.uint8))
    stained = glass.copy()
    stained[16:24, 32:40] = 230, 200, 230
    assert not is_empty(torch.from_numpy(stained).permute(2, 0, 1))
    assert not is_empty(torch.full((3, 64, 64), 219, dtype=torch.uint8))

    image = np.full((64, 400, 3), 240, np.uint8)
    image[:, :64] = noise(64, 64)
    calls = []
    forward = lambda pixels: calls.append(len(pixels)) or torch.full((len(pixels), 2, 64, 64), 0.5)  # noqa: E731
    for skip, count in ((True, 2), (False, 8)):  # tiles at 0 and 48 hold noise
        calls.clear()
        ((row, fields),) = in_tiles(ArrayReader(image), forward, (0.0, -1.0), CPU, 64, 2, skip)
        assert (row, sum(calls)) == (0, count)
        torch.testing.assert_close(fields[:, :, :48], torch.full((2, 64, 48), 0.5))
        empty = torch.tensor([0.0, -1.0] if skip else [0.5, 0.5])[:, None, None]
        torch.testing.assert_close(fields[:, :, 112:], empty.expand(2, 64, 288))
    sdf = whole(predict_image(model, np.full((40, 40, 3), 240, np.uint8), CROPS, fields=FIELDS, skip_background=True))
    assert [x.unique().tolist() for x in sdf] == [[0.0], [-1.0], [0.0]]


@pytest.mark.parametrize("target", [(37, 23), (80, 61), (1300, 11), (20, 23), (1, 1)])
@pytest.mark.parametrize("heights", [(37,), (1, 1, 5, 30), (20, 17)])
def test_resized_pieces_equal_the_resized_image(target: tuple[int, int], heights: tuple[int, ...]) -> None:
    field = torch.rand(2, 37, 23)
    starts = [0, *itertools.accumulate(heights)]
    pieces = list(resized(zip(starts, field.split(heights, 1), strict=False), (37, 23), target))
    assert [row for row, _ in pieces] == [0, *itertools.accumulate(piece.shape[1] for _, piece in pieces)][:-1]
    assert max(piece.shape[1] for _, piece in pieces) <= 512
    expected = functional.interpolate(field[None], target, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces], 1), expected, rtol=0, atol=1e-5)


def test_tta_is_the_mean_over_the_eight_symmetries() -> None:
    kernel = torch.rand(1, 3, 3, 3)  # without symmetry
    forward = lambda pixels: functional.conv2d(pixels.float(), kernel, padding=1)  # noqa: E731
    mean = sum(kernel.rot90(turns, (2, 3)) for turns in range(4)) / 8
    mean = mean + mean.flip(3)
    pixels = torch.randint(256, (2, 3, 5, 9), dtype=torch.uint8)
    expected = functional.conv2d(pixels.float(), mean, padding=1)
    torch.testing.assert_close(eightfold(forward)(pixels), expected, rtol=1e-5, atol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def test_memory_does_not_depend_on_the_height(model: SemiMoE) -> None:
    """Neither the largest tensor nor the largest region that is read grows with the image."""
    largest = []
    for height in (300, 1500):
        image, regions = ArrayReader(np.zeros((height, 80, 3), np.uint8)), []
        read = image.read
        image.read = lambda *region, read=read, regions=regions: regions.append(region[2]) or read(*region)
        image.full_size = (height // 2, 40)
        with LargestTensor() as tensors:
            for _ in predict_image(model, image, CROPS, fields=FIELDS, tile=64):
                pass
        largest.append((tensors.bytes, max(regions)))
    assert largest[0] == largest[1]


@pytest.mark.parametrize(
    ("size", "far"), [((64, 110), True), ((110, 64), True), ((64, 100), False), ((100, 64), False)]
)
def test_long_images_are_said_whichever_side_is_long(size, far):
    image = ArrayReader(np.zeros((*size, 3), np.uint8))
    assert (mismatch(image, CROPS._replace(sampling="resize")) is not None) == far


def test_slides_are_known_by_their_names():
    assert is_slide(Path("A.SVS"))
    assert is_slide(Path("a.ndpi"))
    assert not is_slide(Path("a.tif"))
    assert not is_slide(None)
