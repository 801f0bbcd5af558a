"""Pure functions of the epoch: learning rate, unsupervised weight, and order of the images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def learning_rate(epoch: int, base: float, warmup_epochs: int, decay_epochs: int, decay: float) -> float:
    """Learning rate of an epoch (from 0): linear from 0 to `base`, then times `decay` every `decay_epochs` epochs.

    The published schedule (0.5, 20, 50, 0.5) starts at 0 and halves the learning rate at epochs 71, 121 and 171.
    """
    if epoch <= warmup_epochs:
        return base * epoch / warmup_epochs if warmup_epochs else base
    return base * decay ** ((epoch - warmup_epochs - 1) // decay_epochs)


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
