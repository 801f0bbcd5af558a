"""The batches of an epoch: which images, in which order, and how each is to be augmented.

Order and augmentation are drawn on the CPU by generators keyed by (seed, epoch, step), so that they depend neither on
where the images are nor on what was drawn before, and need not be saved to resume a run. Among several processes all
draw those of the global batch, of which each takes its rows.
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

ORDER, LABELED, UNLABELED = range(3)  # streams of random numbers
AHEAD = 2  # batches made while the device computes

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    labeled: Dataset
    unlabeled: Dataset | None
    preprocessing: Preprocessing


class Images(NamedTuple):
    """B images as they are stored, and what is to be done to them."""

    images: Tensor  # uint8 (B, 3, S, S)
    masks: Tensor | None  # uint8 (B, S, S)
    augmentation: Augmentation


class Batch(NamedTuple):
    """What one step of a process learns from."""

    labeled: Images
    unlabeled: Images | None

    def parts(self, count: int) -> list[Batch]:
        """The batch cut into equal parts, the first images of each kind in the first of them."""
        return [map_tensors(self, lambda t, part=part: t.chunk(count)[part]) for part in range(count)]


class Batches:
    """The batches of any epoch of a run, on the device.

    data_device: where the images stay, "device" or "host"; from the host they come pinned, while the device computes.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device, world: World) -> None:
        self.config, self.device, self.world = config, device, world
        self.data_device = data_device(config.data_device, data, device)
        home = device if self.data_device == "device" else torch.device("cpu")
        self.labeled = data.labeled.images.to(home), data.labeled.masks.to(home)
        self.unlabeled = None if data.unlabeled is None else (data.unlabeled.images.to(home), None)

    @property
    def steps_per_epoch(self) -> int:
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        if self.unlabeled is not None:
            return len(self.unlabeled[0]) // self.config.unlabeled_batch
        return -(-len(self.labeled[0]) // self.config.labeled_batch)

    def of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of the epoch's steps from `first_step` on."""
        batches = self._stored(epoch, first_step)
        if self.data_device == "host":
            batches = ahead(batches, AHEAD)
        for batch in batches:
            yield map_tensors(batch, lambda t: t.to(self.device, non_blocking=True))

    def _stored(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The same before they are brought to the device."""
        c, steps = self.config, self.steps_per_epoch
        random = generator(c.seed, epoch, ORDER)
        # in this order, because they draw from one generator
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
        """Which images the steps of an epoch take, int64 (steps, batch), where the images are."""
        return epoch_order(len(images), steps * batch, random).view(steps, batch).to(images.device)

    def _images(self, stored: tuple[Tensor, Tensor | None], rows: Tensor, random: torch.Generator) -> Images:
        """This process's share of the global batch that the rows of the data set make up."""
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
    """Where the images stay; auto: on the device, unless they would take more than half of what it has free."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "device"
    parts = [data.labeled.images, data.labeled.masks, *([] if data.unlabeled is None else [data.unlabeled.images])]
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if sum(part.numel() for part in parts) <= free / 2 else "host"


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, of which up to `count` are made by a thread before they are asked for."""
    end = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The function of every tensor of nested named tuples, in the same named tuples; None stays None."""
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
