"""What changes from epoch to epoch, as pure functions of it: learning rate, unsupervised weight, order of the data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def learning_rate(epoch: int, base: float, warmup_epochs: int, decay_epochs: int, decay: float) -> float:
    """base * epoch / warmup up to the end of the warm-up, then base, multiplied by `decay` every decay_epochs epochs.

    The published schedule (0.5, 20, 50, 0.5) starts with a learning rate of 0 and halves at epochs 71, 121 and 171.
    """
    if epoch <= warmup_epochs:
        return base * epoch / warmup_epochs if warmup_epochs else base
    return base * decay ** ((epoch - warmup_epochs - 1) // decay_epochs)


def unsupervised_weight(epoch: int, epochs: int, final: float) -> float:
    """u = final * (epoch + 1) / epochs."""
    return final * (epoch + 1) / epochs


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU random generator that depends on the seed and the key alone, so that nothing need be saved to resume it."""
    # the length tells (1,) from (1, 0), which SeedSequence takes for the same
    state = np.random.SeedSequence([seed, len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def epoch_order(available: int, needed: int, random: torch.Generator) -> Tensor:
    """`needed` indices into `available` samples, shuffled: each sample as often as the others, or once more.

    A labeled set smaller than the unlabeled one is repeated whole, and the remainder drawn at random.
    """
    repeats, remainder = divmod(needed, available)
    extra = torch.randperm(available, generator=random)[:remainder]
    order = torch.cat([torch.arange(available).repeat(repeats), extra])
    return order[torch.randperm(needed, generator=random)]
