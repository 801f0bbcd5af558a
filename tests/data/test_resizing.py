"""Resizing of images and masks, and the statistics of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from semimoe_fast.data.folders import (
    NORMALIZATION,
    channel_statistics,
    load_part,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from semimoe_fast.data.listing import list_images

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
IDS = RNG.integers(0, 3, (20, 30), np.uint8)


def test_image_of_the_target_size_is_not_resampled():
    square = COLORS[:, :20].copy()
    np.testing.assert_array_equal(resize_image(square, 20).permute(1, 2, 0), square)
    np.testing.assert_array_equal(resize_mask(IDS[:, :20], 20), IDS[:, :20])


@pytest.mark.parametrize("size", [16, 32, 256])
def test_resizing_is_what_opencv_does(size):
    cv2 = pytest.importorskip("cv2")
    image = cv2.resize(COLORS, (size, size), interpolation=cv2.INTER_LINEAR)
    # OpenCV rounds weights to 11 bits and truncates between its two passes: up to one gray level.
    np.testing.assert_allclose(resize_image(COLORS, size).permute(1, 2, 0).int(), image.astype(int), atol=1)
    mask = cv2.resize(IDS, (size, size), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(resize_mask(IDS, size), mask)


def test_resizing_is_bilinear_and_rounded():
    pixels = torch.from_numpy(COLORS).permute(2, 0, 1)[None].double()
    expected = functional.interpolate(pixels, (17, 17), mode="bilinear", align_corners=False)[0]
    # Half a level of rounding, and float32 weights before it.
    torch.testing.assert_close(resize_image(COLORS, 17).double(), expected, rtol=0, atol=0.5 + 1e-3)


def test_antialiased_shrinking_is_that_of_pillow():
    image = RNG.integers(0, 256, (90, 70, 3), np.uint8)
    expected = np.array(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    # Pillow rounds between the two passes, and both round the result
    np.testing.assert_allclose(resize_image(image, 16, antialias=True).permute(1, 2, 0).int(), expected, atol=2)
    assert np.abs(resize_image(image, 16).permute(1, 2, 0).numpy().astype(int) - expected).max() > 30
    enlarged = resize_image(COLORS, 64)
    assert (resize_image(COLORS, 64, antialias=True).int() - enlarged.int()).abs().max() <= 1  # nothing to smooth


def test_resizing_reproduces_glas(glas_folder):
    """GlaS256 was made from the native images by OpenCV (see above for the one level)."""
    for path in list_images(glas_folder / "native" / "image"):
        expected = read_image(glas_folder / "val" / "image" / path.name).astype(int)
        np.testing.assert_allclose(resize_image(read_image(path), 256).permute(1, 2, 0).int(), expected, atol=1)
        mask = resize_mask(read_mask(glas_folder / "native" / "mask" / path.name), 256)
        np.testing.assert_array_equal(mask, read_mask(glas_folder / "val" / "mask" / path.name))


# -------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_the_pixels():
    images = torch.from_numpy(RNG.integers(0, 200, (4, 3, 9, 7), np.uint8))
    mean, std = channel_statistics(images)
    pixels = images.numpy() / 255
    # Float64 sums over 252 pixels, in another order.
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_statistics_of_several_sets_are_those_of_all_their_images():
    images = torch.from_numpy(RNG.integers(0, 200, (140, 3, 5, 4), np.uint8))  # more than one chunk of 64
    assert channel_statistics(images[:9], images[9:]) == channel_statistics(images)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(channel_statistics(images)[0], pixels.mean((0, 2, 3)), rtol=1e-12)  # as above


def test_constant_channel_can_be_divided_by_its_std():
    images = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    assert channel_statistics(images) == (pytest.approx([0.2] * 3), pytest.approx([1 / 255] * 3))


def test_no_pixels_have_no_statistics():
    with pytest.raises(ValueError, match=r"\(0, 3, 4, 4\)"):
        channel_statistics(torch.empty(0, 3, 4, 4, dtype=torch.uint8))


def test_statistics_of_glas(glas_folder):
    part = load_part(glas_folder, "train_unsup_68", 256, with_masks=False)
    mean, std = channel_statistics(part.images)
    # The published values are of the whole set; this part has 68 of its images, resized.
    np.testing.assert_allclose(mean, NORMALIZATION["glas"][0], atol=0.02)
    np.testing.assert_allclose(std, (0.168, 0.248, 0.132), atol=0.02)
