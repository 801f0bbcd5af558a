"""The batches of an epoch: image indices, their order, and the augmentation parameters of every image.

Generators on the CPU, keyed by (seed, epoch, step), draw order and augmentation. The draws do not depend on the device
of the images or on earlier draws, so a checkpoint need not store generator states. With several processes, each
process draws for the global batch and keeps its own rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.augment import Augmentation
from ..data.folders import Dataset
from .config import TrainConfig
from .distributed import World
from .schedule import epoch_order, generator

ORDER, LABELED, UNLABELED = range(3)  # keys of independent random streams
PREFETCHED = 2  # batches that a thread prepares while the device computes

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """Labeled images with masks, unlabeled images (None for the supervised baseline), and the normalization."""

    labeled: Dataset
    unlabeled: Dataset | None
    preprocessing: Preprocessing


class Images(NamedTuple):
    """B stored images with their masks and augmentation parameters."""

    images: Tensor  # uint8 (B, 3, S, S)
    masks: Tensor | None  # (B, S, S), uint8 0/1 or int32 ids
    augmentation: Augmentation


class Batch(NamedTuple):
    """The images of one process in one step."""

    labeled: Images
    unlabeled: Images | None

    def parts(self, count: int) -> list[Batch]:
        """Split the batch into `count` equal parts along the batch dimension."""
        return [map_tensors(self, lambda t, part=part: t.chunk(count)[part]) for part in range(count)]


class Batches:
    """The batches of a run, on the device, for any epoch.

    data_device: memory of all images, "device" or "host". From the host, a thread prepares batches ahead in pinned
    memory, and copies to the device overlap with computation.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device, world: World) -> None:
        self.config, self.device, self.world = config, device, world
        self.data_device = data_device(config.data_device, data, device)
        memory = device if self.data_device == "device" else torch.device("cpu")
        self.labeled = data.labeled.images.to(memory), data.labeled.masks.to(memory)
        self.unlabeled = None if data.unlabeled is None else (data.unlabeled.images.to(memory), None)

    @property
    def steps_per_epoch(self) -> int:
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        if self.unlabeled is not None:
            return len(self.unlabeled[0]) // self.config.unlabeled_batch
        return -(-len(self.labeled[0]) // self.config.labeled_batch)

    def of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, on the device, from step `first_step` on."""
        batches = self._on_data_device(epoch, first_step)
        if self.data_device == "host":
            batches = prefetch(batches, PREFETCHED)
        for batch in batches:
            yield map_tensors(batch, lambda t: t.to(self.device, non_blocking=True))

    def _on_data_device(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The batches of `of_epoch` in the memory of the images."""
        c, steps = self.config, self.steps_per_epoch
        random = generator(c.seed, epoch, ORDER)
        # labeled before unlabeled, because both draw from one generator
        labeled = self._rows(self.labeled[0], steps, c.labeled_batch, random)
        unlabeled = None
        if self.unlabeled is not None:
            unlabeled = self._rows(self.unlabeled[0], steps, c.unlabeled_batch, random)
        for step in range(first_step, steps):
            others = None
            if unlabeled is not None:
                others = self._images(self.unlabeled, unlabeled[step], generator(c.seed, epoch, UNLABELED, step))
            yield Batch(self._images(self.labeled, labeled[step], generator(c.seed, epoch, LABELED, step)), others)

    def _rows(self, images: Tensor, steps: int, batch: int, random: torch.Generator) -> Tensor:
        """Image indices of all steps of an epoch, int64 (steps, batch), on the device of the images."""
        return epoch_order(len(images), steps * batch, random).view(steps, batch).to(images.device)

    def _images(self, stored: tuple[Tensor, Tensor | None], rows: Tensor, random: torch.Generator) -> Images:
        """This process's part of the global batch. rows: image indices of the global batch, int64."""
        share = self.world.share(len(rows))
        augmentation = augment.draw(len(rows), self.config.image_size, random)
        batch = Images(
            *(None if tensor is None else tensor[rows[share]] for tensor in stored),
            map_tensors(augmentation, lambda t: t[share]),
        )
        pin = self.data_device == "host" and self.device.type == "cuda"
        return map_tensors(batch, Tensor.pin_memory) if pin else batch


def data_device(
    wanted: Literal["auto", "device", "host"], data: TrainingData, device: torch.device
) -> Literal["device", "host"]:
    """Memory for the images; auto means the device unless the images need more than half of its free memory."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "device"
    parts = [data.labeled.images, data.labeled.masks, *([] if data.unlabeled is None else [data.unlabeled.images])]
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if sum(part.nbytes for part in parts) <= free / 2 else "host"


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """The items in order; a thread computes up to `count` of them in advance."""
    end = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield item


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Nested named tuples with the function applied to every tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(*(map_tensors(field, function) for field in value))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested named tuples."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for field in value:
            yield from tensors_of(field)
