"""How fast a run is and how much memory it takes, in numbers that machines can be compared by."""

from __future__ import annotations

import resource

import torch
from torch.utils.flop_counter import FlopCounterMode

from .model import SemiMoE


def flops_per_step(width: int, image_size: int, images: int) -> int:
    """Floating-point operations of a training step's U-Nets, forward and backward: a multiply and an add are two.

    width: channels of the first level; image_size: side in pixels; images: of the labelled and the unlabelled batch
    together, which cost the same. Counted are the convolutions, with those of the experts' own heads, from the shapes
    alone: nothing is computed, and no random number is drawn. Gates and losses, far below a hundredth, are not.
    """
    with torch.device("meta"):
        experts = SemiMoE(width=width).experts
        batch = torch.empty(images, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        for expert in experts:
            _, own = expert(batch)
            own.sum().backward()
    return counter.get_total_flops()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of tensors on a CUDA device; else of the process, resident, as Linux counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
