"""The batches of an epoch: device and host memory, order, parts, and prefetching."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from semimoe_fast.data.folders import Dataset
from semimoe_fast.training.batches import (
    Batch,
    Batches,
    MagnifiedSquares,
    TrainingData,
    data_device,
    map_tensors,
    prefetch,
    tensors_of,
)
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.distributed import World
from semimoe_fast.training.sources import load_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(tiny_config, synthetic=(3, 6, 1))


@pytest.fixture(scope="module")
def data(config: TrainConfig) -> TrainingData:
    return load_data(config)[0]


def batches(config: TrainConfig, data: TrainingData, **changes) -> Batches:
    return Batches(dataclasses.replace(config, **changes), data, CPU, World())


def assert_equal(ours: Batch, theirs: Batch) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first_step", [0, 2])
def test_images_in_host_memory_give_the_same_batches(config, data, first_step: int) -> None:
    resident, streamed = (batches(config, data, data_device=where) for where in ("device", "host"))
    pairs = list(zip(resident.of_epoch(1, first_step), streamed.of_epoch(1, first_step), strict=True))
    assert len(pairs) == 3 - first_step
    for ours, theirs in pairs:
        assert_equal(ours, theirs)


def test_batches_depend_on_the_epoch_only(config, data) -> None:
    every = [[list(tensors_of(batch)) for batch in batches(config, data).of_epoch(epoch)] for epoch in (0, 0, 1)]
    same = [
        [
            torch.equal(a, b)
            for ours, theirs in zip(every[0], other, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        for other in every[1:]
    ]
    assert all(same[0])
    assert not all(same[1])


def test_an_epoch_takes_every_unlabeled_image_once(config, data) -> None:
    taken = torch.cat([batch.unlabeled.images for batch in batches(config, data).of_epoch(0)])
    assert sorted(image.sum().item() for image in taken) == sorted(
        image.sum().item() for image in data.unlabeled.images
    )


def test_labeled_and_unlabeled_images_are_augmented_apart(config, data) -> None:
    batch = next(batches(config, data).of_epoch(0))
    labeled, unlabeled = (list(tensors_of(images.augmentation)) for images in (batch.labeled, batch.unlabeled))
    assert not all(torch.equal(a, b) for a, b in zip(labeled, unlabeled, strict=True))


def test_parts_concatenate_to_the_batch(config, data) -> None:
    (batch, *_) = batches(config, data, unlabeled_batch=6).of_epoch(0)
    parts = batch.parts(2)
    assert [len(part.unlabeled.images) for part in parts] == [3, 3]
    assert [len(part.labeled.augmentation.extent) for part in parts] == [1, 1]
    for whole, *cut in zip(*(tensors_of(value) for value in (batch, *parts)), strict=True):
        assert torch.equal(whole, torch.cat(cut))


def test_prefetch_keeps_the_order_and_prepares_items() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    pending = prefetch(items(), 2)
    assert next(pending) == 0
    assert second.wait(10)  # the thread made it before it was requested
    assert list(pending) == [1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]


def test_prefetch_propagates_errors_and_stops_its_thread() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("disk error")

    pending = prefetch(items(), 2)
    assert next(pending) == 0
    with pytest.raises(OSError, match="disk error"):
        next(pending)
    left = prefetch(iter(range(100)), 2)
    next(left)
    left.close()  # as after an interruption
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_data_device_depends_on_free_memory(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three labeled images with masks and six unlabeled images, of 32 x 32 pixels."""
    size = 32 * 32 * (3 * 4 + 6 * 3)
    cuda = torch.device("cuda")
    for free, expected in ((2 * size, "device"), (2 * size - 2, "host")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * size))
        assert data_device("auto", data, cuda) == expected
    assert data_device("host", data, cuda) == "host"
    assert data_device("auto", data, CPU) == "device"


def test_map_tensors_keeps_none(config, data) -> None:
    (batch, *_) = batches(config, data).of_epoch(0)
    doubled: Batch = map_tensors(batch._replace(unlabeled=None), lambda t: t.to(torch.float64))
    assert doubled.unlabeled is None
    assert all(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors_of(doubled))


def test_magnified_squares_are_at_independent_places():
    dataset = Dataset(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None, ["a"])
    source = MagnifiedSquares(dataset, CPU, 2.0)
    _, augmentation = source.draw(torch.zeros(1000, dtype=torch.int64), torch.Generator().manual_seed(0))
    row, column = augmentation.corner.double().T
    assert (row != column).double().mean() > 0.8
