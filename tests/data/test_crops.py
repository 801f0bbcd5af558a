"""Random crops: where they are, how often images give one, and their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from semimoe_fast.data import augment, crops
from semimoe_fast.data.crops import FOREGROUND, JITTER, Crops, Foreground, corners, crops_in
from semimoe_fast.data.ragged import Ragged, starts_of

CPU = torch.device("cpu")
SIZE = 32


def ragged(*sizes: tuple[int, int], foreground: float = 0.3) -> Ragged:
    random = torch.Generator().manual_seed(1)
    sides = torch.tensor(sizes)
    count = int(sides.prod(1).sum())
    return Ragged(
        pixels=torch.randint(256, (count, 3), dtype=torch.uint8, generator=random),
        masks=(torch.rand(count, generator=random) < foreground).int() * 7,
        starts=starts_of(sides),
        sizes=sides,
        names=[str(index) for index in range(len(sizes))],
    )


def draw(images: Ragged, rows: list[int]) -> tuple[Tensor, augment.Augmentation]:
    return Crops(images, SIZE, CPU).draw(torch.tensor(rows), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(100, 60), (40, 33), (20, 50), (5, 3)])
def test_crops_lie_inside_large_images_and_hold_small_ones(shape: tuple[int, int]) -> None:
    corner, augmentation = draw(ragged(shape), [0] * 2000)
    assert not augmentation.corner.any()
    extent = augmentation.extent
    assert extent.min() == round(SIZE / JITTER)
    assert extent.max() == round(SIZE * JITTER)
    below, above = (extent < SIZE).float().mean(), (extent > SIZE).float().mean()
    assert abs(below - above) < 0.1  # uniform in the logarithm
    for axis, side in enumerate(shape):
        start, end = corner[:, axis], corner[:, axis] + extent
        fits = extent <= side
        assert ((start >= 0) & (end <= side))[fits].all()
        assert ((start <= 0) & (end >= side))[~fits].all()
        if fits.any() and side > SIZE * JITTER:
            assert start.min() == 0
            assert (end == side).any()


def test_jitter_bounds_the_magnification() -> None:
    """The windows hold the largest crop."""
    images = ragged((SIZE, SIZE))
    crops = Crops(images, SIZE, CPU, jitter=1.5)
    rows = torch.zeros(2000, dtype=torch.int64)
    corner, augmentation = crops.draw(rows, torch.Generator().manual_seed(0))
    assert augmentation.extent.min() == round(SIZE / 1.5)
    assert augmentation.extent.max() == SIZE * 1.5
    assert crops.cut(rows[:2], corner[:2])[0].shape == (2, 3, SIZE * 1.5, SIZE * 1.5)


def test_half_of_the_labeled_crops_hold_a_chosen_foreground_pixel() -> None:
    """A single foreground pixel at the corner of a large image, which a uniform crop nearly never holds."""
    images = ragged((400, 500), foreground=0)
    images.masks[500 * 399 + 499] = 1
    corner, augmentation = draw(images, [0] * 1000)
    held = (corner + augmentation.extent[:, None] == torch.tensor([400, 500])).all(1)
    assert abs(held.float().mean() - FOREGROUND) < 0.05  # 3 standard deviations
    images.masks.zero_()
    corner, augmentation = draw(images, [0] * 1000)  # an image without glands: uniform crops
    assert (corner + augmentation.extent[:, None] == torch.tensor([400, 500])).all(1).float().mean() < 0.01


def test_every_foreground_pixel_is_found_once() -> None:
    images = ragged((9, 14), (6, 5), (3, 4))
    images.masks[images.starts[1] : images.starts[2]] = 0
    find = Foreground(images).find
    for index in (0, 2):
        expected = images.mask(index).nonzero()
        count = len(expected)
        where = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        pixels, found = find(torch.full((count,), index), where)
        assert found.all()
        assert torch.equal(pixels, expected)
    assert find(torch.tensor([1, 2]), torch.tensor([0.5, 0.0]).double())[1].tolist() == [False, True]


def test_images_give_crops_by_their_area_and_small_ones_one_each() -> None:
    images = ragged((10, 10), (64, 64), (32, 64), (8, 100))
    assert crops_in(images, SIZE) == 1 + 4 + 2 + 1
    crops = Crops(images, SIZE, CPU)
    for seed in range(5):
        order = crops.order(8, torch.Generator().manual_seed(seed))
        assert order.bincount(minlength=4).tolist() == [1, 4, 2, 1]
        counts = crops.order(12, torch.Generator().manual_seed(seed)).bincount(minlength=4)
        assert ((counts - torch.tensor([1.5, 6, 3, 1.5])).abs() < 1).all()
    assert not torch.equal(order, order.sort().values)


def test_crop_is_a_bilinear_resize_of_a_square_of_the_mirrored_image() -> None:
    images = ragged((50, 70), (20, 25))
    crops = Crops(images, SIZE, CPU)
    rows = torch.tensor([0, 1, 0, 1])
    corner, augmentation = crops.draw(rows, torch.Generator().manual_seed(3))
    still = augmentation._replace(
        flip=torch.zeros_like(augmentation.flip), transpose=torch.zeros_like(augmentation.transpose)
    )
    windows, masks = crops.cut(rows, corner)
    found, labels = augment.resample(windows, masks, still, SIZE, centered=True)
    turned, turned_labels = augment.resample(windows, masks, augmentation, SIZE, centered=True)
    margin = 40
    for i, (row, (top, left), extent) in enumerate(
        zip(rows.tolist(), (corner + margin).tolist(), augmentation.extent.tolist(), strict=True)
    ):
        padded = np.pad(images.image(row), ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
        square = torch.from_numpy(padded[top : top + extent, left : left + extent]).permute(2, 0, 1).double()
        expected = functional.interpolate(square[None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0]
        # Two float32 coordinates, each off by up to 40 * 2^-23 pixels, on slopes of up to 255 per pixel.
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=2 * 255 * 40 * 2**-23)
        nearest = ((np.arange(SIZE) + 0.5) * extent / SIZE).astype(int)
        padded = np.pad(images.mask(row), margin, mode="symmetric")[top : top + extent, left : left + extent]
        np.testing.assert_array_equal(labels[i], padded[nearest[:, None], nearest])
        axes = [axis - 2 for axis, flip in enumerate(augmentation.flip[i].tolist()) if flip]
        for plain, moved in ((found[i], turned[i]), (labels[i], turned_labels[i])):
            expected = plain.flip(axes)
            expected = expected.mT if augmentation.transpose[i] else expected
            # other coordinates are rounded, as above
            torch.testing.assert_close(moved.double(), expected.double(), rtol=0, atol=4 * 255 * 40 * 2**-23)


@pytest.mark.parametrize("extent", [26, 31, 32, 40])
def test_masks_of_crops_lie_on_their_images(extent: int) -> None:
    """Images whose values are the row of their pixels, and masks that number the rows."""
    rows = torch.arange(40)[None, :, None].expand(1, 40, 40)
    square = augment.Augmentation(
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor([extent]), torch.zeros(1, 2).bool(), torch.zeros(1).bool()
    )
    images, masks = augment.resample(rows[:, None].repeat(1, 3, 1, 1).byte(), rows, square, SIZE, centered=True)
    inside = slice(1, SIZE - 1)  # at the border images are clamped
    difference = masks[0, inside, 0] - images[0, 0, inside, 0]
    assert difference.abs().max() <= 0.5 + 1e-4  # float32 coordinates, as above
    assert difference.mean().abs() < 0.05  # -0.4 to -0.5 by the rule of INTER_NEAREST


def test_corners_reach_the_last_place():
    draws = torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)[:, None].expand(-1, 2)
    corner = corners(torch.tensor([[3, -3]]).expand(101, 2), draws)
    assert corner[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert corner[:, 1].unique().tolist() == [-3, -2, -1, 0]


def test_windows_hold_the_largest_crop():
    made = Crops(ragged((100, 100)), SIZE, CPU, jitter=1.3)
    rows = torch.zeros(2000, dtype=torch.int64)
    corner, augmentation = made.draw(rows, torch.Generator().manual_seed(0))
    assert augmentation.extent.max() == 42  # of 41.6
    assert made.cut(rows[:2], corner[:2])[0].shape == (2, 3, 42, 42)


def test_a_crop_around_a_foreground_pixel_holds_it(monkeypatch):
    monkeypatch.setattr(crops, "FOREGROUND", 1.0)
    images = ragged((400, 500), foreground=0)
    images.masks[500 * 200 + 250] = 1
    corner, augmentation = draw(images, [0] * 2000)
    place = torch.tensor([200, 250]) - corner
    assert ((place >= 0) & (place < augmentation.extent[:, None])).all()
    assert (place == 0).any(0).all()
    assert (place == augmentation.extent[:, None] - 1).any(0).all()


def test_shares_are_right_on_average():
    made = Crops(ragged((10, 10), (64, 64), (32, 64), (8, 100)), SIZE, CPU)
    orders = [made.order(12, torch.Generator().manual_seed(seed)) for seed in range(200)]
    counts = torch.stack([order.bincount(minlength=4) for order in orders]).double()
    assert ((counts.mean(0) - torch.tensor([1.5, 6, 3, 1.5])).abs() < 0.15).all()  # 4 standard deviations of 1/2
