"""Augmentation: the published distribution, OpenCV's geometry, the same for images and masks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from semimoe_fast.data.augment import Augmentation, draw, normalize, resample

UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std that only scale pixels to [0, 1]
COINS = list(product([False, True], repeat=3))  # flip rows, flip columns, transpose


def pixels(*shape, high=256):
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def identity(batch, size):
    """The augmentation that changes nothing."""
    return Augmentation(
        torch.zeros(batch, 2, dtype=torch.int64),
        torch.full((batch,), size),
        torch.zeros(batch, 2, dtype=torch.bool),
        torch.zeros(batch, dtype=torch.bool),
    )


def crops(corners, extent):
    batch = len(corners)
    return Augmentation(
        torch.tensor(corners), torch.full((batch,), extent), torch.zeros(batch, 2, dtype=torch.bool),
        torch.zeros(batch, dtype=torch.bool),
    )  # fmt: skip


def symmetries(size):
    """All eight outcomes of the three coins, as one batch."""
    coins = torch.tensor(COINS)
    return Augmentation(torch.zeros(8, 2, dtype=torch.int64), torch.full((8,), size), coins[:, :2], coins[:, 2])


def apply(images, masks, augmentation, mean, std):
    """Images and masks as a step has them, at the size of the images."""
    images, masks = resample(images, masks, augmentation, images.shape[-1])
    return normalize(images, mean, std), masks


def test_three_coins_draw_the_published_symmetries():
    """Published: flip none, rows, columns or both 1/4 each; transpose 1/2; rotation by k * 90 degrees 1/4 each."""
    square = np.arange(4).reshape(2, 2)  # its eight symmetric images differ
    published = Counter()
    for flip, transpose, rotation in product([(), (0,), (1,), (0, 1)], [False, True], range(4)):
        image = np.flip(square, flip)
        image = np.rot90(image.T if transpose else image, rotation)
        published[tuple(image.flat)] += Fraction(1, 32)
    squares = torch.from_numpy(square).to(torch.uint8).expand(8, 2, 2)
    _, squares = apply(pixels(8, 3, 2, 2), squares, symmetries(2), *UNIT)
    assert published == {tuple(image.flatten().tolist()): Fraction(1, 8) for image in squares}


@pytest.mark.parametrize("size", [1, 7, 64])
def test_symmetries_of_images_and_masks_agree_with_numpy(size):
    image, mask = pixels(3, size, size), pixels(size, size, high=2)
    images, masks = apply(image.expand(8, -1, -1, -1), mask.expand(8, -1, -1), symmetries(size), *UNIT)
    for index, (rows, columns, transpose) in enumerate(COINS):
        axes = [axis for axis, flip in ((-2, rows), (-1, columns)) if flip]
        expected_image, expected_mask = (np.flip(array.numpy(), axes) for array in (image, mask))
        if transpose:
            expected_image, expected_mask = expected_image.swapaxes(-1, -2), expected_mask.swapaxes(-1, -2)
        np.testing.assert_array_equal(masks[index], expected_mask)
        # Coordinates in float32 are off by up to size * 2^-24 pixels, so values by up to 255 times that.
        np.testing.assert_allclose(255 * images[index], expected_image, rtol=1e-6, atol=255 * size * 2**-24)


@pytest.mark.parametrize(("size", "extent"), [(64, 56), (50, 44), (16, 1)])
def test_crop_is_a_bilinear_resize_of_the_square(size, extent):
    last = size - extent
    corners = [(0, 0), (last, last), (last // 2, last), (0, last // 3)]
    images = pixels(len(corners), 3, size, size)
    result, _ = apply(images, None, crops(corners, extent), *UNIT)
    squares = torch.stack([x[:, r : r + extent, c : c + extent] for x, (r, c) in zip(images, corners, strict=True)])
    expected = functional.interpolate(squares.double(), (size, size), mode="bilinear", align_corners=False)
    # Two float32 coordinates, each off by up to size * 2^-23 pixels, on slopes of up to 255 per pixel.
    torch.testing.assert_close(255 * result.double(), expected, rtol=1e-6, atol=2 * 255 * size * 2**-23)


@pytest.mark.parametrize("extent", [20, 24, 33, 48])
def test_mirror_images_fill_a_crop_beyond_the_image(extent):
    size, furthest = 24, 48 - extent
    corners = [(-24, furthest), (furthest, -24), (-5, -11), (min(furthest, 2), min(furthest, 1))]
    images, masks = pixels(4, 3, size, size), pixels(4, size, size)
    result, result_masks = resample(images, masks, crops(corners, extent), size)
    nearest = np.arange(size) * extent // size
    for index, (row, column) in enumerate(corners):
        square = np.s_[..., row + 24 : row + 24 + extent, column + 24 : column + 24 + extent]
        padded = np.pad(images[index], ((0, 0), (24, 24), (24, 24)), mode="symmetric")[square]
        expected = functional.interpolate(torch.tensor(padded)[None].double(), (size, size), mode="bilinear")[0]
        torch.testing.assert_close(result[index].double(), expected, rtol=1e-6, atol=2 * 255 * 72 * 2**-23)
        mask = np.pad(masks[index], 24, mode="symmetric")[square]
        np.testing.assert_array_equal(result_masks[index], mask[np.ix_(nearest, nearest)])


@pytest.mark.parametrize("size", [64, 256])
def test_crop_is_what_opencv_does(size):
    cv2 = pytest.importorskip("cv2")
    extent = size * 7 // 8
    corners = [(0, 0), (3, 5), (size - extent, size - extent)]
    images, masks = pixels(3, 3, size, size), pixels(3, size, size, high=2)
    result, result_masks = apply(images, masks, crops(corners, extent), *UNIT)
    for index, (row, column) in enumerate(corners):
        square = np.s_[row : row + extent, column : column + extent]
        image = images[index].permute(1, 2, 0).numpy()[square].astype(np.float32)
        expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        # Both hold coordinates in float32 (see above); 0.02 of 255 levels is far below the image's own rounding.
        np.testing.assert_allclose(255 * result[index].permute(1, 2, 0), expected, atol=0.02)
        expected = cv2.resize(masks[index].numpy()[square], (size, size), interpolation=cv2.INTER_NEAREST)
        np.testing.assert_array_equal(result_masks[index], expected)


def test_crop_comes_before_the_symmetry():
    image, corner = pixels(1, 3, 16, 16), [(1, 2)]
    plain, _ = apply(image, None, crops(corner, 14), *UNIT)
    turned = Augmentation(torch.tensor(corner), torch.tensor([14]), torch.tensor([[True, False]]), torch.tensor([True]))
    result, _ = apply(image, None, turned, *UNIT)
    torch.testing.assert_close(result, plain.flip(-2).mT, rtol=0, atol=0)  # the same interpolation, moved pixels


def test_drawn_parameters_follow_the_published_distribution():
    count, size = 20_000, 64
    drawn = draw(count, size, torch.Generator().manual_seed(0))
    cropped = drawn.extent != size
    assert set(drawn.extent.tolist()) == {56, 64}
    assert (drawn.corner[~cropped] == 0).all()
    coins = torch.column_stack([cropped, drawn.flip, drawn.transpose]).double()
    # Five standard deviations of the mean and of the correlation of fair, independent coins.
    assert (coins.mean(0) - 0.5).abs().max() < 5 * 0.5 / count**0.5
    assert (torch.corrcoef(coins.T) - torch.eye(4)).abs().max() < 5 / count**0.5
    share = torch.bincount(drawn.corner[cropped].flatten(), minlength=9) / (2 * cropped.sum())
    assert len(share) == 9  # corners 0 to 8, both included
    # Five standard deviations of a share of 1/9 among about `count` corners (two coordinates, half of the images).
    assert (share - 1 / 9).abs().max() < 5 * (8 / 81 / count) ** 0.5


def test_draw_repeats_with_its_generator():
    first, again, other = (draw(8, 64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for name in ("corner", "extent", "flip", "transpose"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.flip, other.flip)


@pytest.mark.parametrize("size", [16, 48, 256])
def test_crop_is_seven_eighths(size):
    assert draw(32, size, torch.Generator().manual_seed(0)).extent.min() == round(size * 7 / 8)


def test_empty_batch():
    images, masks = apply(pixels(0, 3, 16, 16), pixels(0, 16, 16), draw(0, 16, torch.Generator()), *UNIT)
    assert images.shape == (0, 3, 16, 16)
    assert masks.shape == (0, 16, 16)


def test_result_is_normalized():
    images = pixels(2, 3, 16, 16)
    mean, std = (0.8, 0.5, 0.7), (0.1, 0.2, 0.4)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    augmented, masks = apply(images, None, identity(2, 16), mean, std)
    assert masks is None
    for result in (augmented, normalize(images, mean, std)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)  # a few roundings of float32


def test_images_masks_and_augmentation_that_do_not_match_are_refused():
    images, masks, params = pixels(2, 3, 16, 16), pixels(2, 16, 16), identity(2, 16)
    with pytest.raises(ValueError, match="16 x 15"):
        apply(images[..., :15], None, params, *UNIT)
    with pytest.raises(ValueError, match=r"masks \(2, 15, 16\)"):
        apply(images, masks[:, :15], params, *UNIT)
    with pytest.raises(ValueError, match="augmentation of 2"):
        apply(images[:1], None, params, *UNIT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_without_synchronization():
    images, masks, params = pixels(4, 3, 64, 64), pixels(4, 64, 64, high=2), draw(4, 64, torch.Generator())
    expected, expected_masks = apply(images, masks, params, *UNIT)
    images, masks = images.cuda(), masks.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, result_masks = apply(images, masks, params, *UNIT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-4)  # coordinates rounded in another order
    assert torch.equal(result_masks.cpu(), expected_masks)
