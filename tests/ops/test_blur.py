"""The blur of the compiled module against SciPy's correlation and its counterpart in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from semimoe_fast.data import appearance
from semimoe_fast.ops._native_blur import convolve_


def draw(radius: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) from 0 to 255, and a Gaussian of its own for each, up to the radius."""
    random = torch.Generator().manual_seed(radius)
    sigma = radius / 3 * (torch.rand(shape[0], generator=random, dtype=torch.float64) + 0.5)
    return 255 * torch.rand(shape, generator=random), appearance._gaussian(sigma, radius).float()


def blurred(images: Tensor, kernel: Tensor) -> Tensor:
    result = images.clone()
    convolve_(result, kernel)
    return result


def rounding(radius: int) -> float:
    """The largest error of values up to 255: in both passes, radius + 3 roundings of at most 255 each."""
    return 2 * (radius + 3) * 255 * 2**-24


@pytest.mark.parametrize(
    ("radius", "shape"),
    [
        (0, (1, 3, 1, 1)),
        (0, (2, 3, 5, 7)),
        (1, (2, 1, 2, 83)),  # a whole strip of vectors, a vector and a rest in every instruction set
        (3, (3, 3, 31, 67)),
        (3, (2, 3, 64, 128)),
        (7, (2, 3, 40, 8)),  # a mirror of the whole row
        (15, (1, 3, 16, 16)),
        (15, (2, 2, 37, 49)),
    ],
)
def test_blur_is_the_sum_of_its_definition(radius: int, shape: tuple[int, ...], instruction_set: str) -> None:
    images, kernel = draw(radius, *shape)
    result, counterpart = blurred(images, kernel), images.clone()
    for index, weights in enumerate(kernel.double().numpy()):
        expected = images[index].double().numpy()
        for axis in (1, 2):
            expected = ndimage.correlate1d(expected, np.concatenate([weights[:0:-1], weights]), axis, mode="mirror")
        np.testing.assert_allclose(result[index], expected, rtol=0, atol=rounding(radius))
    appearance._convolve(counterpart, kernel)
    # PyTorch adds the pixels one by one: 2 radius + 2 roundings in each pass
    torch.testing.assert_close(result, counterpart, rtol=0, atol=2 * rounding(radius))


def test_a_nan_stays_within_the_radius(instruction_set: str) -> None:
    images, kernel = draw(2, 1, 1, 40, 90)
    images[0, 0, 20, 1] = images[0, 0, 39, 77] = float("nan")
    expected = torch.zeros(40, 90, dtype=torch.bool)
    expected[18:23, 0:4] = expected[37:40, 75:80] = True
    assert torch.equal(blurred(images, kernel).isnan()[0, 0], expected)


def test_threads_do_not_change_the_result(instruction_set: str) -> None:
    images, kernel = draw(3, 3, 3, 85, 99)  # enough pixels for threads
    results = []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        results.append(blurred(images, kernel))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(1, 3, 4, 9), (1, 3, 9, 4), (1, 3, 0, 9)])
def test_sides_of_at_most_the_radius_are_refused_as_by_pytorch(shape: tuple[int, ...]) -> None:
    for convolve in (convolve_, appearance._convolve):
        with pytest.raises(RuntimeError):
            convolve(torch.zeros(shape), torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="both sides"):
        convolve_(torch.zeros(shape), torch.ones(1, 0))


@pytest.mark.parametrize(
    ("images", "kernel"),
    [
        (torch.zeros(2, 3, 4, 5).double(), torch.ones(2, 2)),
        (torch.zeros(2, 3, 5, 4).mT, torch.ones(2, 2)),
        (torch.zeros(3, 4, 5), torch.ones(3, 2)),
        (torch.zeros(2, 3, 4, 5, device="meta"), torch.ones(2, 2)),
        (torch.zeros(2, 3, 4, 5), torch.ones(1, 2)),
        (torch.zeros(2, 3, 4, 5), torch.ones(2)),
        (torch.zeros(2, 3, 4, 5), torch.ones(2, 2).double()),
    ],
    ids=["double", "strided", "3-D", "another device", "one kernel for two", "1-D kernel", "double kernel"],
)
def test_unsupported_tensors_are_refused(images: Tensor, kernel: Tensor) -> None:
    with pytest.raises(ValueError, match="a blur takes contiguous float32 images") as caught:
        convolve_(images, kernel)
    assert "\n" not in str(caught.value)
