"""The batches of an epoch: image indices, their order, and the augmentation parameters of every image.

Generators on the CPU, keyed by (seed, epoch, step), draw order and augmentation. The draws do not depend on the device
of the images or on earlier draws, so a checkpoint need not store generator states. With several processes, each
process draws for the global batch and keeps its own rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..data import appearance, augment, crops
from ..data.appearance import Appearance
from ..data.augment import Augmentation
from ..data.crops import Crops
from ..data.folders import Dataset
from ..data.ragged import Ragged
from .config import TrainConfig
from .distributed import World
from .schedule import epoch_order, generator

ORDER, LABELED, UNLABELED = range(3)  # keys of independent random streams
PREFETCHED = 2  # batches that a thread prepares while the device computes

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """Labeled images with masks, unlabeled images (None for the supervised baseline), and the normalization."""

    labeled: Dataset | Ragged
    unlabeled: Dataset | Ragged | None
    preprocessing: Preprocessing
    note: str | None = None  # what a run says about images that are resampled, in one line


class Images(NamedTuple):
    """B stored images, or windows of them that hold the crops, with their masks and augmentation parameters."""

    images: Tensor  # uint8 (B, 3, L, L)
    masks: Tensor | None  # (B, L, L), uint8 0/1 or int32 ids
    augmentation: Augmentation
    appearance: Appearance | None = None


class Batch(NamedTuple):
    """The images of one process in one step."""

    labeled: Images
    unlabeled: Images | None

    def parts(self, count: int) -> list[Batch]:
        """Split the batch into `count` equal parts along the batch dimension."""
        return [map_tensors(self, lambda t, part=part: t.chunk(count)[part]) for part in range(count)]


class Source(Protocol):
    """Where the images of a part of the data come from."""

    count: int  # images in an epoch

    def order(self, needed: int, random: torch.Generator) -> Tensor:
        """Indices of the images of an epoch, int64 (needed,), on the CPU."""

    def draw(self, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Augmentation]:
        """What `cut` needs to know of images (B,) besides their indices, (B, ...), and their augmentation."""

    def cut(self, rows: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images, uint8 (B, 3, L, L), and masks (B, L, L), in the memory of all images."""


class Squares:
    """Whole images of one size; an epoch takes each of them once."""

    def __init__(self, dataset: Dataset, memory: torch.device) -> None:
        self.images = dataset.images.to(memory)
        self.masks = None if dataset.masks is None else dataset.masks.to(memory)

    @property
    def count(self) -> int:
        return len(self.images)

    def order(self, needed: int, random: torch.Generator) -> Tensor:
        return epoch_order(len(self.images), needed, random)

    def draw(self, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Augmentation]:
        return rows, augment.draw(len(rows), self.images.shape[-1], random)

    def cut(self, rows: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = rows.to(self.images.device, non_blocking=True)
        return self.images[rows], None if self.masks is None else self.masks[rows]


class MagnifiedSquares(Squares):
    """Whole images of one size, magnified by 1 / jitter to jitter, uniformly in the logarithm.

    A square is at a random place of a larger image; a smaller image is at a random place of the square, surrounded by
    its mirror images. The images may have more pixels than the squares (`sources.stored_size`).
    """

    def __init__(self, dataset: Dataset, memory: torch.device, jitter: float) -> None:
        super().__init__(dataset, memory)
        self.jitter = jitter

    def draw(self, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Augmentation]:
        scale, *place = torch.rand(3, len(rows), generator=random, dtype=torch.float64)
        coins = torch.rand(len(rows), 3, generator=random) < 0.5
        side = self.images.shape[-1]
        extent = crops.extents(side, self.jitter, scale)
        corner = crops.corners((side - extent)[:, None].expand(-1, 2), torch.stack(place, 1))
        return rows, Augmentation(corner, extent, coins[:, :2], coins[:, 2])


class Batches:
    """The batches of a run, on the device, for any epoch.

    data_device: memory of all images, "device" or "host". From the host, a thread prepares batches ahead in pinned
    memory, and the process does not wait for the copies, which the device makes between the steps.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device, world: World) -> None:
        self.config, self.device, self.world = config, device, world
        self.data_device = data_device(config.data_device, data, device)
        memory = device if self.data_device == "device" else torch.device("cpu")
        self.labeled = self._source(data.labeled, memory)
        self.unlabeled = None if data.unlabeled is None else self._source(without_masks(data.unlabeled), memory)

    def _source(self, images: Dataset | Ragged, memory: torch.device) -> Source:
        jitter = self.config.scale_jitter
        if isinstance(images, Ragged):
            return Crops(images, self.config.image_size, memory, crops.JITTER if jitter is None else jitter)
        return Squares(images, memory) if jitter is None else MagnifiedSquares(images, memory, jitter)

    @property
    def steps_per_epoch(self) -> int:
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        if self.unlabeled is not None:
            return self.unlabeled.count // self.config.unlabeled_batch
        return -(-self.labeled.count // self.config.labeled_batch)

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
        labeled = self.labeled.order(steps * c.labeled_batch, random).view(steps, -1)
        unlabeled = None
        if self.unlabeled is not None:
            unlabeled = self.unlabeled.order(steps * c.unlabeled_batch, random).view(steps, -1)
        for step in range(first_step, steps):
            others = None
            if unlabeled is not None:
                others = self._images(self.unlabeled, unlabeled[step], generator(c.seed, epoch, UNLABELED, step))
            yield Batch(self._images(self.labeled, labeled[step], generator(c.seed, epoch, LABELED, step)), others)

    def _images(self, source: Source, rows: Tensor, random: torch.Generator) -> Images:
        """This process's part of the global batch. rows: image indices of the global batch, int64, on the CPU."""
        share = self.world.share(len(rows))
        drawn, augmentation = source.draw(rows, random)
        changes = appearance.draw(len(rows), self.config.image_size, self.config.strengths, random)
        batch = Images(
            *source.cut(rows[share], drawn[share]),
            *(map_tensors(parameters, lambda t: t[share]) for parameters in (augmentation, changes)),
        )
        pin = self.data_device == "host" and self.device.type == "cuda"
        return map_tensors(batch, Tensor.pin_memory) if pin else batch


def without_masks(images: Dataset | Ragged) -> Dataset | Ragged:
    """The same images; synthetic unlabeled images have masks, which training must not see."""
    return replace(images, masks=None)


def data_device(
    wanted: Literal["auto", "device", "host"], data: TrainingData, device: torch.device
) -> Literal["device", "host"]:
    """Memory for the images; auto means the device unless the images need more than half of its free memory."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "device"
    needed = data.labeled.nbytes + (0 if data.unlabeled is None else without_masks(data.unlabeled).nbytes)
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if needed <= free / 2 else "host"


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
