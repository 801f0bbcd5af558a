"""Changes of appearance against float64 formulas of single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from semimoe_fast.data import appearance as module
from semimoe_fast.data.appearance import Appearance, Density, Noise, Strengths, apply, draw
from semimoe_fast.ops import backend

SIZE, BATCH = 24, 5


@pytest.fixture
def images() -> Tensor:
    """Float32 (BATCH, 3, SIZE, SIZE) from 0 to 255, with fractions as after resampling."""
    images = 255 * torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, :4] = torch.tensor([0.0, 0.3, 1.0, 255.0])
    return images


def drawn(batch: int = BATCH, seed: int = 0, **strengths: float) -> Appearance:
    return draw(batch, SIZE, Strengths(**strengths), torch.Generator().manual_seed(seed))


def test_nothing_is_drawn_without_strengths() -> None:
    random = torch.Generator().manual_seed(0)
    before = random.get_state()
    assert draw(BATCH, SIZE, Strengths(), random) is None
    assert torch.equal(random.get_state(), before)


def test_stains_are_scaled_and_shifted_in_optical_density(images: Tensor) -> None:
    """Unmix, change and mix, pixel by pixel; the amounts of the tests come from the drawn map itself."""
    strength = 0.2
    appearance = drawn(stain=strength)
    assert [field is None for field in appearance] == [False, True, True, True]
    found = apply(images.clone(), appearance)
    hematoxylin, eosin = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
    stains = np.stack([hematoxylin, eosin, np.cross(hematoxylin, eosin)])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    draws = 2 * torch.rand(8, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:4].numpy() - 1
    for image, result, change in zip(images.double().numpy(), found.double().numpy(), draws.T, strict=True):
        density = -np.log(np.maximum(image, 1).reshape(3, -1) / 255)
        amounts = np.linalg.solve(stains.T, density)
        amounts[:2] = amounts[:2] * (1 + strength * change[:2, None]) + strength * change[2:, None]
        expected = (255 * np.exp(-stains.T @ amounts)).clip(0, 255).reshape(image.shape)
        # log2 of up to 8 and three products in float32, whose errors of about 8 * 2^-22 multiply the value
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-4)
        assert np.abs(result - image).max() > 5


def test_brightness_multiplies(images: Tensor) -> None:
    appearance = drawn(brightness=0.5)
    assert ((appearance.gain > 0.5) & (appearance.gain < 1.5)).all()
    expected = (images * appearance.gain.view(-1, 1, 1, 1)).clamp(max=255)
    assert torch.equal(apply(images.clone(), appearance), expected)
    assert (expected == 255).any()


def test_blur_is_gaussian(images: Tensor) -> None:
    largest = 1.5
    sigmas = largest * torch.rand(8, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[5]
    found = apply(images.clone(), drawn(blur=largest))
    for image, result, sigma in zip(images, found, sigmas.tolist(), strict=True):
        expected = ndimage.gaussian_filter(image.double().numpy(), (0, sigma, sigma), mode="mirror", radius=(0, 5, 5))
        # 22 products and sums in float32 of values up to 255
        np.testing.assert_allclose(result, expected, rtol=0, atol=22 * 255 * 2**-24)


def test_blur_needs_no_compiled_module(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    appearance = drawn(blur=1.5)
    expected = apply(images.clone(), appearance)
    convolve_, seen = module._native_blur.convolve_, []
    monkeypatch.setattr(module._native_blur, "convolve_", lambda *tensors: (seen.append(1), convolve_(*tensors)))
    assert torch.equal(apply(images.clone(), appearance), expected)
    assert len(seen) == len(images)
    with backend("portable"):
        portable = apply(images.clone(), appearance)
    monkeypatch.setattr(module._native, "module", lambda: None)
    assert torch.equal(apply(images.clone(), appearance), portable)
    assert len(seen) == len(images)
    # sums of at most 22 products in another order
    torch.testing.assert_close(portable, expected, rtol=0, atol=2 * 22 * 255 * 2**-24)


def test_noise_is_gaussian_and_differs_between_images() -> None:
    size, std = 256, torch.tensor([10.0, 20.0])
    images = torch.full((2, 3, size, size), 128.0)
    noise = Noise(std, torch.tensor([0, 1000]))
    grain = (apply(images.clone(), Appearance(None, None, None, noise)) - 128).double()
    values = grain[0].numel()
    for image, sigma in zip(grain, std.tolist(), strict=True):
        assert abs(image.mean()) < 4 * sigma / values**0.5
        assert abs(image.std() / sigma - 1) < 4 / (2 * values) ** 0.5
        assert abs(image.abs().mean() / sigma - (2 / np.pi) ** 0.5) < 4 * 0.61 / values**0.5
    first, second = (image.flatten() / image.std() for image in grain)
    assert abs((first * second).mean()) < 4 / values**0.5
    places = drawn(batch=50, noise=0.1).noise.place
    assert len(places.unique()) > 40
    assert places.min() >= 0
    assert places.max() <= 3 * SIZE**2


def test_images_of_a_batch_are_independent_and_results_stay_in_range(images: Tensor) -> None:
    appearance = drawn(stain=1.0, brightness=1.0, blur=2.0, noise=1.0)
    together = apply(images.clone(), appearance)
    assert together.min() >= 0
    assert together.max() <= 255
    for index in range(BATCH):
        one = slice(index, index + 1)
        parts = Appearance(
            Density(*(field[one] for field in appearance.density)),
            appearance.gain[one],
            appearance.kernel[one],
            Noise(*(field[one] for field in appearance.noise)),
        )
        assert torch.equal(apply(images[one].clone(), parts), together[one])


def test_a_batch_at_once_gives_the_same(images: Tensor) -> None:
    """As on a GPU; a CPU changes image by image."""
    appearance = drawn(stain=0.2, brightness=0.2, blur=1.0, noise=0.1)
    together = images.clone()
    module._change(together, appearance, slice(0, BATCH))
    # a CPU leaves out negligible weights of an image's blur
    torch.testing.assert_close(together, apply(images.clone(), appearance), rtol=2e-5, atol=1e-3)


def test_stain_of_a_gpu_equals_the_matrix_product() -> None:
    shift, matrix, x = torch.randn(2, 3, 1), torch.randn(2, 3, 3), torch.randn(2, 3, 50)
    torch.testing.assert_close(module._baddbmm(shift, matrix, x), torch.baddbmm(shift, matrix, x))


def test_channels_last_images_give_the_same(images: Tensor) -> None:
    appearance = drawn(stain=0.2, brightness=0.2, blur=1.0, noise=0.1)
    other = images.clone(memory_format=torch.channels_last)
    # the memory format may change the order of sums in the 3 x 3 matrix product
    torch.testing.assert_close(apply(other, appearance), apply(images.clone(), appearance), rtol=2e-5, atol=1e-3)
