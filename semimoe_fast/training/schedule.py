"""Pure functions of the epoch: learning rate, unsupervised weight, and order of the images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int, base: float) -> float:
    """Learning rate of an epoch (from 0) by the schedule of a run, at most `base`."""
    if config.schedule == "cosine":
        return cosine(epoch, base, config.warmup_epochs, config.epochs)
    return step_decay(epoch, base, config.warmup_epochs, config.decay_epochs, config.decay)


def step_decay(epoch: int, base: float, warmup_epochs: int, decay_epochs: int, decay: float) -> float:
    """Linear from 0 to `base`, then times `decay` every `decay_epochs` epochs.

    The published schedule (0.5, 20, 50, 0.5) starts at 0 and halves the learning rate at epochs 71, 121 and 171.
    """
    if epoch <= warmup_epochs:
        return base * epoch / warmup_epochs if warmup_epochs else base
    return base * decay ** ((epoch - warmup_epochs - 1) // decay_epochs)


def cosine(epoch: int, base: float, warmup_epochs: int, epochs: int) -> float:
    """Linear to `base`, which epoch `warmup_epochs` has, then half a cosine that would reach 0 at epoch `epochs`.

    Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.
    """
    if epoch < warmup_epochs:
        return base * (epoch + 1) / (warmup_epochs + 1)
    return base * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2


def unsupervised_weight(epoch: int, epochs: int, final: float) -> float:
    """Weight u of the unlabeled loss in an epoch (from 0): final * (epoch + 1) / epochs."""
    return final * (epoch + 1) / epochs


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU random generator that depends only on seed and key, so that a checkpoint need not store its state."""
    # SeedSequence treats (1,) and (1, 0) alike; the length distinguishes them
    state = np.random.SeedSequence([seed, len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def epoch_order(available: int, needed: int, random: torch.Generator) -> Tensor:
    """Shuffled indices of samples, int64 (needed,); the counts of any two samples differ by at most 1.

    If needed > available, all samples repeat needed // available times, and a random subset fills the remainder.
    """
    repeats, remainder = divmod(needed, available)
    extra = torch.randperm(available, generator=random)[:remainder]
    order = torch.cat([torch.arange(available).repeat(repeats), extra])
    return order[torch.randperm(needed, generator=random)]
