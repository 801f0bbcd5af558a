"""Time the changes of appearance of a batch beside loops over its images with scikit-image and albumentations.

    OMP_NUM_THREADS=1 python -m benchmarks.appearance          # two Markdown tables

16 images of 256 x 256 pixels, one thread, CPU time of the thread, median of 15 rounds in which all programs take turns.
Ours changes float32 images, as a step has them after resampling; the other programs get and return uint8 images, as
their users have them. The results of ours are compared with scikit-image's before anything is timed (noise: its
standard deviation); albumentations draws its own strengths. The last column is the share of a training step of the
published recipe (width 64, 256 x 256, 2 labeled and 2 unlabeled images) on the same thread. The second table has the
times of single passes over the same floats, image by image, which the changes cannot do without.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from skimage import color, exposure, filters, util
from torch import Tensor

from semimoe_fast.data.appearance import STAINS, Appearance, Strengths, apply, draw
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

from .tables import markdown

BATCH, SIZE, ROUNDS, SEED = 16, 256, 15, 0
STRENGTHS = {
    "stain": Strengths(stain=0.2),
    "brightness": Strengths(brightness=0.2),
    "blur": Strengths(blur=1.0),
    "noise": Strengths(noise=0.05),
}
UNMIXING = np.linalg.inv(STAINS)
PASSES: dict[str, Callable[[Tensor, Tensor], object]] = {  # over an image, and another one, both (3, SIZE, SIZE)
    "multiply": lambda image, other: image.mul_(1.001),
    "add another image": lambda image, other: image.add_(other, alpha=0.001),
    "3 x 3 matrix product": lambda image, other: torch.mm(torch.eye(3), image.flatten(1), out=other.flatten(1)),
    "natural logarithm, NumPy": lambda image, other: np.log(image.numpy(), out=image.numpy()),
    "natural logarithm, torch": lambda image, other: image.log_(),
    "power of 2": lambda image, other: torch.exp2(image, out=other),
}
COLUMNS = ["change", "ours, ms", "scikit-image, ms", "albumentations, ms", "share of a step, %"]

OfImage = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3)


def stained_images() -> np.ndarray:
    """uint8 (BATCH, SIZE, SIZE, 3) of positive amounts of all stains, which scikit-image does not clip."""
    rng = np.random.default_rng(SEED)
    amounts = rng.uniform([0.3, 0.3, 0.05], [0.9, 0.9, 0.1], (BATCH, SIZE, SIZE, 3))
    return (255 * np.exp(-amounts @ STAINS)).round().astype(np.uint8)


def scikit_image(kind: str) -> list[OfImage]:
    """The changes that `draw` draws with SEED, as calls of scikit-image for single images."""
    draws = torch.rand(8, BATCH, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).numpy()
    strengths, unit = STRENGTHS[kind], -np.log(1e-6)  # scikit-image's unit of optical density

    def stain(image: np.ndarray, change: np.ndarray) -> np.ndarray:
        amounts = color.separate_stains(image, UNMIXING)
        amounts[..., :2] = amounts[..., :2] * (1 + 0.2 * change[:2]) + 0.2 * change[2:] / unit
        return util.img_as_ubyte(color.combine_stains(amounts, STAINS))

    def brightness(image: np.ndarray, gain: float) -> np.ndarray:
        return exposure.adjust_gamma(image, 1, gain)

    def blur(image: np.ndarray, sigma: float) -> np.ndarray:
        blurred = filters.gaussian(image, sigma, mode="mirror", preserve_range=True, channel_axis=-1, truncate=3)
        return blurred.round().astype(np.uint8)

    def noise(image: np.ndarray, std: float) -> np.ndarray:
        return util.img_as_ubyte(util.random_noise(image, var=std**2))

    call, values = {
        "stain": (stain, 2 * draws[:4].T - 1),
        "brightness": (brightness, 1 + strengths.brightness * (2 * draws[4] - 1)),
        "blur": (blur, strengths.blur * draws[5]),
        "noise": (noise, strengths.noise * draws[6]),
    }[kind]
    return [lambda image, value=value: call(image, value) for value in values]


def albumentation(kind: str) -> OfImage:
    import albumentations
    import cv2

    cv2.setNumThreads(1)
    transform = {
        "stain": albumentations.HEStain(
            "preset", "ruifrok", intensity_scale_range=(0.8, 1.2), augment_background=True, p=1
        ),
        "brightness": albumentations.RandomBrightnessContrast(0.2, 0, p=1),
        "blur": albumentations.GaussianBlur(blur_limit=7, sigma_limit=(0.01, 1.0), p=1),
        "noise": albumentations.GaussNoise(std_range=(0.0, 0.05), p=1),
    }[kind]
    return lambda image: transform(image=image)["image"]


def check(kind: str, images: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raise AssertionError unless ours, float32, is what scikit-image computes, uint8."""
    if kind == "noise":
        stds = [(result.astype(float) - images).std((1, 2, 3)) for result in (ours, theirs)]
        np.testing.assert_allclose(*stds, rtol=0.05, atol=0.5)  # theirs is rounded and clipped to uint8
    elif kind == "blur":  # the radius of scikit-image's kernel depends on its sigma
        np.testing.assert_allclose(ours, theirs, atol=2)
    else:
        np.testing.assert_allclose(ours, theirs, atol=1.1)


def cpu_time(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def step_time() -> float:
    """CPU time in seconds of a training step of the published recipe."""
    config = dataclasses.replace(TrainConfig(), synthetic=(2, 2, 1), steps_per_epoch=3, device="cpu", threads=1)
    trainer = Trainer(config, load_data(config)[0], torch.device("cpu"))
    return statistics.median(cpu_time(lambda batch=batch: trainer.train_step(batch)) for batch in trainer.begin_epoch())


def measure(kind: str, images: np.ndarray) -> list[float]:
    """Seconds for the batch: ours, scikit-image, albumentations."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    changes: Appearance = draw(BATCH, SIZE, STRENGTHS[kind], torch.Generator().manual_seed(SEED))
    skimage, albu = scikit_image(kind), albumentation(kind)

    def of_skimage() -> np.ndarray:
        return np.stack([call(image) for call, image in zip(skimage, images, strict=True)])

    ours = apply(batch.clone(), changes).permute(0, 2, 3, 1).numpy()
    check(kind, images, ours, of_skimage())
    rounds = []
    for _ in range(ROUNDS):
        copy: Tensor = batch.clone()
        rounds.append(
            [
                cpu_time(lambda copy=copy: apply(copy, changes)),
                cpu_time(of_skimage),
                cpu_time(lambda: [albu(image) for image in images]),
            ]
        )
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def measure_pass(call: Callable[[Tensor, Tensor], object], images: np.ndarray) -> float:
    """Milliseconds for the batch."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 + 1  # no change leaves the range of floats
    times = []
    for _ in range(ROUNDS):
        copy, other = batch.contiguous(), batch[0].contiguous()
        times.append(cpu_time(lambda copy=copy, other=other: [call(image, other) for image in copy]))
    return 1000 * statistics.median(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    images = stained_images()
    times = {kind: measure(kind, images) for kind in STRENGTHS}
    step = step_time()
    rows = [
        [kind, *(f"{1000 * x:.2f}" for x in seconds), f"{100 * seconds[0] * 4 / BATCH / step:.1g}"]
        for kind, seconds in times.items()
    ]
    print(markdown(COLUMNS, rows))
    passes = [[name, f"{measure_pass(call, images):.2f}"] for name, call in PASSES.items()]
    print(markdown(["one pass over the floats", "ms"], passes))


if __name__ == "__main__":
    main()
