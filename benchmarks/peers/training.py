"""The one loop that trains every method: the same data, augmentation, batches, schedule and number of steps."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data import appearance, augment
from semimoe_fast.data.appearance import Strengths
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.folders import Dataset, Pair, list_pairs
from semimoe_fast.device import autocast
from semimoe_fast.errors import UserError
from semimoe_fast.training.batches import Batches, Images, TrainingData, map_tensors
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.distributed import World
from semimoe_fast.training.ema import EMA
from semimoe_fast.training.schedule import generator, learning_rate
from semimoe_fast.training.sources import load_data, parts_of, stored_size
from semimoe_fast.training.state import like, with_prefix

from .method import Batch, Method
from .scores import Scored, score

STRONG = Strengths(stain=0.2, brightness=0.2, blur=1.0, noise=0.03)  # the usual ones of docs/training.md, at their most
STRONG_KEY = 3  # of the random streams of an epoch; `batches` has 0 to 2
POINTS = 20  # of the learning curve


class Splits(NamedTuple):
    """The images of a folder. All methods normalize by the statistics of all training images."""

    labeled: Dataset
    unlabeled: Dataset  # with masks for the upper bound alone
    scored: Dataset | None  # the unlabeled images as val is, if the folder has all of their masks
    val: Dataset  # masks are instance maps
    preprocessing: Preprocessing
    described: dict[str, Any]  # what `described` says of each part

    def of(self, method: Method) -> TrainingData:
        """What a method learns from."""
        labeled, unlabeled = self.labeled, None
        if method.learns_from == "labeled and unlabeled":
            unlabeled = self.unlabeled
        elif method.learns_from == "labels of all":
            pairs = ((labeled.images, self.unlabeled.images), (labeled.masks, self.unlabeled.masks))
            labeled = Dataset(*(torch.cat(pair) for pair in pairs), labeled.names + self.unlabeled.names)
        return TrainingData(labeled, unlabeled, self.preprocessing)


def load_splits(config: TrainConfig, cache: Cache, all_labels: bool) -> Splits:
    """The parts of --data. all_labels: the unlabeled images must have masks. Raises UserError as `load_data`."""
    data, _ = load_data(config, cache)
    parts, unlabeled = parts_of(config), data.unlabeled
    masks = config.data / parts.unlabeled / "mask"
    if all_labels and not masks.is_dir():
        raise UserError(f"{masks} is missing: add it for supervised-all, or choose other methods by --method")
    complete = {path.stem for path in masks.glob("*")} >= set(unlabeled.names)
    if all_labels:
        unlabeled = cache.load_part(config.data, parts.unlabeled, stored_size(config, parts), True)
    scored = cache.load_part(config.data, parts.unlabeled, config.image_size, True) if complete else None
    val = cache.load_part(config.data, parts.val, config.image_size, True, instances=True)
    names = {"labeled": parts.labeled, "unlabeled": parts.unlabeled, "val": parts.val}
    # Without the masks of unlabeled images, so that the runs of other methods do not depend on them.
    listed = {part: list_pairs(config.data, name, part != "unlabeled") for part, name in names.items()}
    digests = {part: described(pairs) for part, pairs in listed.items()}
    return Splits(data.labeled, unlabeled, scored, val, data.preprocessing, digests)


def described(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many images there are, and the SHA-256 of their names and of their files with those of masks."""
    names, files = hashlib.sha256("\n".join(image.stem for image, _ in pairs).encode()), hashlib.sha256()
    for path in filter(None, itertools.chain.from_iterable(pairs)):
        files.update(path.read_bytes())
    return {"images": len(pairs), "names_sha256": names.hexdigest(), "files_sha256": files.hexdigest()}


def equal_steps(config: TrainConfig, method: Method, splits: Splits) -> TrainConfig:
    """The batches of a method: as many steps and images as those of the published recipe."""
    steps = len(splits.unlabeled) // config.unlabeled_batch
    images = config.labeled_batch + config.unlabeled_batch
    alone = {} if method.learns_from == "labeled and unlabeled" else {"labeled_batch": images, "unlabeled": "none"}
    return dataclasses.replace(config, steps_per_epoch=steps, **alone)


class Training:
    """A method in training. `save` and `restore` resume it after an epoch, to the last bit on a CPU."""

    def __init__(
        self, config: TrainConfig, method: Callable[[int], Method], splits: Splits, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        self.method = method(config.width).to(device, memory_format=torch.channels_last)
        self.config = equal_steps(config, self.method, splits)
        self.splits, self.device = splits, device
        self.batches = Batches(self.config, splits.of(self.method), device, World())
        self.optimizers = self.method.optimizers(config)
        averaged = config.ema is not None and not self.method.predicts_by_average
        self.ema = EMA(self.method, config.ema) if averaged else None
        self.epoch, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.origins: list[dict[str, str | None]] = []  # machine, torch and commit of its processes

    @property
    def images_per_step(self) -> tuple[int, int]:
        """Labeled and unlabeled images."""
        c = self.config
        return c.labeled_batch, c.unlabeled_batch if c.semi_supervised else 0

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.config, self.epoch, self.config.lr)

    def train_epoch(self) -> None:
        """Train one epoch; the curve gets a point after POINTS of all epochs, and after the last one.

        Raises UserError if the loss is not finite.
        """
        started, cpu_started, epochs = time.perf_counter(), time.process_time(), self.config.epochs
        self.method.train()
        self.optimizers[0].param_groups[0]["lr"] = self.learning_rate
        losses = [self.step(batch, number) for number, batch in enumerate(self._batches(), 1)]
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in epoch {self.epoch}: give a smaller --lr")
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started
        if self.epoch == epochs or self.epoch % max(1, epochs // POINTS) == 0:
            self.curve.append(self._point(loss))

    def step(self, batch: Batch, number: int) -> Tensor:
        """The `number`-th step of the epoch, from 1 -> its loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with autocast(self.config.precision, self.device):
            loss = self.method.loss(batch, (self.epoch + 1) / self.config.epochs)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.method.after_step(self.epoch * self.batches.steps_per_epoch + number)
        if self.ema is not None:
            self.ema.update()
        return loss.detach()

    @property
    def predictor(self) -> Method:
        """The method, or with an EMA of the weights the averaged method."""
        return self.method if self.ema is None else self.ema.after(self.epoch * self.batches.steps_per_epoch)

    def score(self, images: Dataset, tta: bool = False) -> Scored:
        return score(self.predictor, images, self.splits.preprocessing, self.device, self.config.precision, tta)

    @torch.no_grad()
    def _point(self, loss: float) -> dict[str, Any]:
        """A point of the learning curve, with predictions for the unlabeled images if they all have masks."""
        scores = self.score(self.splits.val).pixels
        point = {"epoch": self.epoch, "loss": loss, "dice": scores.dice, "swept_dice": scores.swept_dice}
        if self.splits.scored is not None:
            point["unlabeled_dice"] = self.score(self.splits.scored).pixels.dice
        _, mean, std, *_ = self.splits.preprocessing
        whole = augment.whole(self.splits.labeled.images.to(self.device), self.config.image_size)
        labeled = augment.normalize(whole, mean, std)
        with autocast(self.config.precision, self.device):
            return point | self.method.eval().watched(labeled)

    def _batches(self) -> Iterator[Batch]:
        for number, (labeled, unlabeled) in enumerate(self.batches.of_epoch(self.epoch)):
            images, masks = self._augmented(labeled)
            if unlabeled is None:
                yield Batch(images, masks, None)
                continue
            random = generator(self.config.seed, self.epoch, STRONG_KEY, number)
            drawn = [self._draw(unlabeled, random) for _ in range(self.method.strong_views)]
            strong = tuple(self._augmented(view)[0] for view in drawn)
            weak = unlabeled._replace(appearance=None) if strong else unlabeled
            yield Batch(images, masks, self._augmented(weak)[0], strong)

    def _draw(self, images: Images, random: torch.Generator) -> Images:
        """The same images with strong changes of appearance."""
        drawn = appearance.draw(len(images.images), self.config.image_size, STRONG, random)
        return images._replace(appearance=map_tensors(drawn, lambda t: t.to(self.device, non_blocking=True)))

    def _augmented(self, batch: Images) -> tuple[Tensor, Tensor | None]:
        """Normalized images (B, 3, S, S) and masks (B, S, S), as `semimoe_fast.training.trainer` makes them."""
        images, masks = augment.resample(
            batch.images, batch.masks, batch.augmentation, self.config.image_size, self.config.centered_masks
        )
        if batch.appearance is not None:
            images = appearance.apply(images, batch.appearance)
        _, mean, std, *_ = self.splits.preprocessing
        return augment.normalize(images, mean, std).contiguous(memory_format=torch.channels_last), masks

    def save(self, path: Path) -> None:
        tensors = {f"method.{key}": value for key, value in self.method.state_dict().items()}
        for prefix, parameter, optimizer in self._optimized():
            moments = optimizer.state[parameter].items()
            tensors |= {f"{prefix}{key}": value for key, value in moments if value is not None}
        if self.ema is not None:
            tensors |= {f"average.{key}": value for key, value in self.ema.sums.items()}
        progress = {name: getattr(self, name) for name in ("epoch", "seconds", "cpu_seconds", "curve", "origins")}
        checkpoint.write(path, {"progress": progress}, tensors | {"random": torch.get_rng_state()})

    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote. Raises UserError if it cannot be read."""
        try:
            metadata, tensors = checkpoint.read(path, self.device)
        except UserError as error:
            raise UserError(f"{error}; remove it to train anew") from error
        self.method.load_state_dict(with_prefix(tensors, "method."))
        if self.ema is not None:
            for name, value in with_prefix(tensors, "average.").items():
                self.ema.sums[name].copy_(value)
        for prefix, parameter, optimizer in self._optimized():
            moments = with_prefix(tensors, prefix).items()
            optimizer.state[parameter] = {key: like(parameter, value) for key, value in moments}
        torch.set_rng_state(tensors["random"].cpu())
        vars(self).update(metadata["progress"])

    def _optimized(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        """Each trained parameter, with the prefix of the names of its saved moments, and its optimizer."""
        for number, optimizer in enumerate(self.optimizers):
            (group,) = optimizer.param_groups
            for index, parameter in enumerate(group["params"]):
                yield f"optimizer{number}.{index}.", parameter, optimizer
