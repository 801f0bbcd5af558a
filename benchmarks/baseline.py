"""The published trainer, written from its description, as the baseline of the benchmarks.

It is eager, fp32 and NCHW. Convolutions before BN have biases. The gating module concatenates the experts' features and
forms the mixed features of every task. Losses follow their formulas. Loader workers read, augment and compute the
targets with SciPy and scikit-image. There are five optimizers, and every step reads numbers and empties caches. Each of
these is a field of `Habits` and can be turned off alone. Habits only cost time: the arithmetic equals that of
semimoe_fast.objective, as tests/training/test_baseline.py shows. The networks and the step are written out here, so
that they do not get faster with the package; only simple reference functions come from semimoe_fast.ops.reference.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from skimage.morphology import dilation, disk
from skimage.segmentation import find_boundaries
from torch import Tensor, nn
from torch.utils import data

from semimoe_fast import functional as F
from semimoe_fast.data.augment import normalize
from semimoe_fast.data.folders import NORMALIZATION, read_image, read_mask, resize_image, resize_mask
from semimoe_fast.data.listing import list_images
from semimoe_fast.model import initialize
from semimoe_fast.ops import reference
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.schedule import epoch_order, generator, learning_rate, unsupervised_weight
from semimoe_fast.training.sources import only_part


@dataclasses.dataclass(frozen=True)
class Habits:
    """Habits of the published trainer. They change the time of a step, not its result."""

    nchw: bool = True
    """Images and weights in NCHW, not channels-last."""
    conv_bias: bool = True
    """Convolutions have a bias, which the BN after them cancels."""
    concatenate: bool = True
    """The gating concatenates the experts' features and forms three mixtures; otherwise gates and heads are folded."""
    losses_by_formula: bool = True
    """One-hot targets, softmax and sums, one tensor each; otherwise the package's losses."""
    loader_targets: bool = True
    """Targets by SciPy and scikit-image in the loader's workers; otherwise the package's, on the device."""
    keep_gating_graph: bool = True
    """Pseudo-labels are computed with an autograd graph, which is never used."""
    item_syncs: bool = True
    """Five numbers are read from the device in every step."""
    empty_cache: bool = True
    """The device's memory cache is emptied three times in every step."""
    separate_optimizers: bool = True
    """One SGD per expert and one for the gating, not one for all."""
    untuned_cudnn: bool = True
    """cuDNN chooses algorithms by heuristics, not by trial (cudnn.benchmark)."""


# ---------------------------------------------------------------------------------------------------------- networks
# State dict keys are those of semimoe_fast.model.SemiMoE, and the biases of the convolutions.


class UNet(nn.Module):
    """Images (B, 3, H, W) -> last decoder feature (B, width, H, W), own prediction (B, out_channels, H, W)."""

    def __init__(self, out_channels: int, width: int, bias: bool) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(5)]
        up = list(pairwise(reversed(channels)))
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(twice(i, o, bias) for i, o in pairwise([3, *channels]))
        self.upsample = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), *layer(i, o, bias)) for i, o in up)
        self.decoder = nn.ModuleList(twice(i, o, bias) for i, o in up)
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        for upsample, block, skip in zip(self.upsample, self.decoder, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, upsample(x)], 1))
        return x, self.head(x)


def layer(i: int, o: int, bias: bool) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, padding=1, bias=bias), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]


def twice(i: int, o: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(*layer(i, o, bias), *layer(o, o, bias))


class Gate(nn.Module):
    """Feature means (B, D) -> weights of the experts (B, E) for one task."""

    def __init__(self, inputs: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, inputs // 2)
        self.attention = nn.Linear(inputs // 2, inputs // 2)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(inputs // 2, experts)

    def forward(self, means: Tensor) -> Tensor:
        hidden = torch.relu(self.linear1(means))
        attention = torch.softmax(self.attention(hidden), 1)
        return torch.softmax(self.linear2(self.dropout(hidden * attention)), 1)


class Gating(nn.Module):
    """Features E x (B, C, H, W) -> gated predictions T x (B, O_k, H, W)."""

    def __init__(self, channels: int, outputs: Sequence[int], dropout: float, concatenate: bool) -> None:
        super().__init__()
        experts, self.concatenate = len(outputs), concatenate
        self.gates = nn.ModuleList(Gate(experts * channels, experts, dropout) for _ in outputs)
        self.heads = nn.ModuleList(nn.Conv2d(channels, out, 1) for out in outputs)

    def forward(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.concatenate:
            means = torch.cat([x.mean((2, 3)) for x in features], 1)
            weights = torch.stack([gate(means) for gate in self.gates], 1)
            return F.multi_gate(
                features, weights, *zip(*((head.weight, head.bias) for head in self.heads), strict=True)
            )
        stacked = torch.cat(list(features), 1)
        means = stacked.mean((2, 3))
        outputs = []
        for gate, head in zip(self.gates, self.heads, strict=True):
            weights = gate(means).unbind(1)
            parts = stacked.chunk(len(weights), 1)
            outputs.append(head(sum(w[:, None, None, None] * x for w, x in zip(weights, parts, strict=True))))
        return outputs


class Networks(nn.Module):
    def __init__(self, width: int, dropout: float, habits: Habits) -> None:
        super().__init__()
        outputs = (2, 1, 2)  # mask, sdf, boundary
        self.experts = nn.ModuleList(UNet(out, width, habits.conv_bias) for out in outputs)
        self.gating = Gating(width, outputs, dropout, habits.concatenate)
        initialize(self)


# -------------------------------------------------------------------------------------------------------------- data


class Samples(data.Dataset):
    """S x S images, read from their files each time: (image,), (image, mask), or (image, mask, sdf, boundary).

    The tensors are float32 (3, S, S), uint8 (S, S), float32 (S, S), uint8 (S, S).
    """

    def __init__(self, images: Path, masks: Path | None, config: TrainConfig, with_targets: bool) -> None:
        self.images, self.masks = list_images(images), None if masks is None else list_images(masks)
        self.size, self.normalization, self.with_targets = config.image_size, config.normalization, with_targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        window, symmetry = random_window(self.size), random_symmetry()
        image = resize_image(read_image(self.images[index])[window], self.size)
        image = normalize(symmetry(image), *NORMALIZATION[self.normalization]).contiguous()
        if self.masks is None:
            return (image,)
        mask = symmetry(resize_mask(read_mask(self.masks[index])[window], self.size)).contiguous()
        return image, mask, *(map(torch.from_numpy, targets(mask.numpy())) if self.with_targets else ())


def random_window(size: int) -> tuple[slice, slice]:
    """With probability 0.5 a random crop of 7/8 of the side, else the whole image."""
    crop = round(size * 7 / 8) if random.random() < 0.5 else size
    row, column = random.randint(0, size - crop), random.randint(0, size - crop)
    return slice(row, row + crop), slice(column, column + crop)


def random_symmetry() -> Callable[[Tensor], Tensor]:
    """With probability 0.75 a flip, each equally likely; with 0.5 a transpose; always a multiple of 90 degrees."""
    flips, transpose = random.choice([(), (-1,), (-2,), (-2, -1)]), random.random() < 0.5
    turns = random.randrange(4)

    def apply(picture: Tensor) -> Tensor:
        picture = picture.flip(flips)
        return torch.rot90(picture.mT if transpose else picture, turns, (-2, -1))

    return apply


def targets(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask uint8 0/1 (S, S) -> signed distance float32 (S, S), boundary uint8 (S, S)."""
    if mask.min() == mask.max():
        return np.full(mask.shape, 1 if mask.max() else -1, np.float32), np.zeros_like(mask)
    inside, outside = distance_transform_edt(mask), distance_transform_edt(1 - mask)
    sdf = inside / inside.max() - outside / outside.max()
    sdf[find_boundaries(mask, mode="inner") & (mask != 0)] = 0
    return sdf.astype(np.float32), dilation(mask, disk(2)) - mask


class Batch(NamedTuple):
    images: Tensor  # (B, 3, S, S)
    targets: tuple[Tensor, ...]  # mask, sdf, boundary, (B, S, S) each
    unlabeled: Tensor  # (B', 3, S, S)


# ----------------------------------------------------------------------------------------------------------- trainer


class Losses(NamedTuple):
    supervised_total: Tensor
    unsupervised_total: Tensor  # weighted by u
    supervised_terms: Tensor  # (3,): mask, sdf, boundary
    unsupervised_terms: Tensor


class Baseline:
    """The published trainer with the recipe `config`, at one `epoch` of its schedules, with the given habits."""

    def __init__(self, config: TrainConfig, device: torch.device, habits: Habits | None = None, epoch: int = 0) -> None:
        self.config, self.device, self.epoch = config, device, epoch
        self.habits = habits = Habits() if habits is None else habits
        self.memory_format = torch.contiguous_format if habits.nchw else torch.channels_last
        torch.manual_seed(config.seed)
        self.networks = Networks(config.width, config.dropout, habits).to(device, memory_format=self.memory_format)
        self.networks.train()
        self.log_vars = nn.Parameter(torch.full((3,), config.initial_log_var, device=device))
        parts = [*self.networks.experts, self.networks.gating] if habits.separate_optimizers else [self.networks]
        lr = learning_rate(config, epoch, config.lr)
        decay = config.weight_decay
        self.optimizers = [torch.optim.SGD(p.parameters(), lr, config.momentum, weight_decay=decay) for p in parts]
        self.optimizers.append(torch.optim.Adam([self.log_vars], config.log_var_lr, weight_decay=decay))

    def batches(self, folder: Path, workers: int) -> Iterator[Batch]:
        """Endless batches of the parts train_sup_* and train_unsup_*; every epoch starts new workers.

        workers: number of workers of both loaders together; 0 loads in the main process.
        """
        config, with_targets = self.config, self.habits.loader_targets
        sup, unsup = (folder / only_part(folder, prefix, "") for prefix in ("train_sup_", "train_unsup_"))
        labeled = Samples(sup / "image", sup / "mask", config, with_targets)
        unlabeled = Samples(unsup / "image", None, config, with_targets)
        steps = len(unlabeled) // config.unlabeled_batch
        order = generator(config.seed)
        while True:
            loaders = [
                data.DataLoader(
                    samples,
                    batch,
                    sampler=epoch_order(len(samples), steps * batch, order).tolist(),
                    num_workers=share,
                    pin_memory=self.device.type == "cuda",
                )
                for samples, batch, share in (
                    (labeled, config.labeled_batch, -(-workers // 2)),
                    (unlabeled, config.unlabeled_batch, workers // 2),
                )
            ]
            for (images, *targets), (others,) in zip(*loaders, strict=True):
                yield Batch(images, tuple(targets), others)

    def train(self, batches: Iterator[Batch], steps: int) -> None:
        for images, targets, unlabeled in islice(batches, steps):
            targets = tuple(target.to(self.device) for target in targets)
            if not self.habits.loader_targets:
                (mask,) = targets
                targets = (mask, *F.distance_targets(mask, self.config.ring_radius))
            self.step(Batch(self.to_device(images), targets, self.to_device(unlabeled)))

    def step(self, batch: Batch) -> Losses:
        """One step on a batch that is on the device."""
        habits, networks = self.habits, self.networks
        u = unsupervised_weight(self.epoch, self.config.epochs, self.config.unsupervised_weight)
        tf32 = torch.backends.cudnn.allow_tf32  # `flags` would turn it on
        with torch.backends.cudnn.flags(enabled=True, benchmark=not habits.untuned_cudnn, allow_tf32=tf32):
            features, own = zip(*(expert(batch.unlabeled) for expert in networks.experts), strict=True)
            with torch.set_grad_enabled(habits.keep_gating_graph):
                pseudo = networks.gating(features)  # the variable keeps the graph until the end of the step
            mask, sdf, boundary = (output.detach() for output in pseudo)
            unsupervised_terms = self._terms([own], (mask.argmax(1), sdf.tanh(), boundary.argmax(1)))
            unsupervised = self._adaptive(unsupervised_terms) * u
            self._empty_cache()

            features, own = zip(*(expert(batch.images) for expert in networks.experts), strict=True)
            supervised_terms = self._terms([own, networks.gating(features)], batch.targets)
            supervised = self._adaptive(supervised_terms)
            self._empty_cache()

            for optimizer in self.optimizers:
                optimizer.zero_grad()
            (unsupervised + supervised).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            if habits.item_syncs:
                _ = [number.item() for number in (unsupervised, supervised, *supervised_terms)]
            self._empty_cache()
        return Losses(*(t.detach() for t in (supervised, unsupervised, supervised_terms, unsupervised_terms)))

    def _terms(self, predictions: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> Tensor:
        losses = reference if self.habits.losses_by_formula else F
        return losses.joint_objective_terms(predictions, *targets)

    def _adaptive(self, terms: Tensor) -> Tensor:
        return reference.adaptive_loss(terms, self.log_vars, self.config.coefficients, self.config.regularizer)

    def to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=self.memory_format)

    def _empty_cache(self) -> None:
        if self.habits.empty_cache:
            torch.cuda.empty_cache()


def clock() -> float:
    """Time in seconds, after the GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
