"""The batches of an epoch: the same from wherever the images are, made ahead, cut into parts."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from semimoe_fast.training import config
from semimoe_fast.training.batches import Batch, Batches, TrainingData, ahead, data_device, map_tensors, tensors_of
from semimoe_fast.training.distributed import World
from semimoe_fast.training.sources import load_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parsed(tiny: list[str]) -> config.TrainConfig:
    return config.parse([*tiny, *"--synthetic 3 6 1".split()])


@pytest.fixture(scope="module")
def data(parsed: config.TrainConfig) -> TrainingData:
    return load_data(parsed)[0]


def batches(parsed: config.TrainConfig, data: TrainingData, **changes) -> Batches:
    return Batches(dataclasses.replace(parsed, **changes), data, CPU, World())


def assert_same(ours: Batch, theirs: Batch) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first_step", [0, 2])
def test_images_on_the_host_give_the_same_batches(parsed, data, first_step: int) -> None:
    resident, streamed = (batches(parsed, data, data_device=where) for where in ("device", "host"))
    pairs = list(zip(resident.of_epoch(1, first_step), streamed.of_epoch(1, first_step), strict=True))
    assert len(pairs) == 3 - first_step
    for ours, theirs in pairs:
        assert_same(ours, theirs)


def test_epochs_differ_and_each_repeats(parsed, data) -> None:
    every = [[list(tensors_of(batch)) for batch in batches(parsed, data).of_epoch(epoch)] for epoch in (0, 0, 1)]
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


def test_an_epoch_takes_every_unlabeled_image_once(parsed, data) -> None:
    taken = torch.cat([batch.unlabeled.images for batch in batches(parsed, data).of_epoch(0)])
    assert sorted(image.sum().item() for image in taken) == sorted(
        image.sum().item() for image in data.unlabeled.images
    )


def test_labeled_and_unlabeled_images_are_augmented_apart(parsed, data) -> None:
    batch = next(batches(parsed, data).of_epoch(0))
    labeled, unlabeled = (list(tensors_of(images.augmentation)) for images in (batch.labeled, batch.unlabeled))
    assert not all(torch.equal(a, b) for a, b in zip(labeled, unlabeled, strict=True))


def test_parts_are_the_batch(parsed, data) -> None:
    (batch, *_) = batches(parsed, data, unlabeled_batch=6).of_epoch(0)
    parts = batch.parts(2)
    assert [len(part.unlabeled.images) for part in parts] == [3, 3]
    assert [len(part.labeled.augmentation.extent) for part in parts] == [1, 1]
    for whole, *cut in zip(*(tensors_of(value) for value in (batch, *parts)), strict=True):
        assert torch.equal(whole, torch.cat(cut))


def test_ahead_keeps_order_and_works_ahead() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    coming = ahead(items(), 2)
    assert next(coming) == 0
    assert second.wait(10)  # made although only one was asked for
    assert list(coming) == [1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]


def test_ahead_hands_on_errors_and_ends_its_thread() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    coming = ahead(items(), 2)
    assert next(coming) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)
    left = ahead(iter(range(100)), 2)
    next(left)
    left.close()  # as where a run is interrupted
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_residence_by_free_memory(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three labeled images with masks and six unlabeled of 32 x 32 pixels take 30 KiB."""
    size = 32 * 32 * (3 * 4 + 6 * 3)
    cuda = torch.device("cuda")
    for free, expected in ((2 * size, "device"), (2 * size - 2, "host")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * size))
        assert data_device("auto", data, cuda) == expected
    assert data_device("host", data, cuda) == "host"
    assert data_device("auto", data, CPU) == "device"


def test_map_tensors_keeps_what_is_missing(parsed, data) -> None:
    (batch, *_) = batches(parsed, data).of_epoch(0)
    doubled: Batch = map_tensors(batch._replace(unlabeled=None), lambda t: t.to(torch.float64))
    assert doubled.unlabeled is None
    assert all(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors_of(doubled))
