"""The distance targets of the compiled module as custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native


@torch.library.custom_op("semimoe_fast::squared_distance", mutates_args=())
def squared_distance(mask: Tensor) -> Tensor:
    """mask: contiguous (B, H, W), uint8 or bool, on CUDA bool or any integer -> int32 (B, H, W)."""
    out = torch.empty_like(mask, dtype=torch.int32)
    _native.squared_distance(mask, out)
    return out


@squared_distance.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=torch.int32)


@torch.library.custom_op("semimoe_fast::distance_targets", mutates_args=())
def distance_targets(mask: Tensor, ring_radius: float) -> tuple[Tensor, Tensor]:
    """mask: as `squared_distance` takes it -> sdf float32 (B, H, W), boundary uint8 (B, H, W)."""
    sdf = torch.empty_like(mask, dtype=torch.float32)
    boundary = torch.empty_like(mask, dtype=torch.uint8)
    _native.distance_targets(mask, sdf, boundary, ring_radius)
    return sdf, boundary


@distance_targets.register_fake
def _(mask: Tensor, ring_radius: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mask, dtype=torch.float32), torch.empty_like(mask, dtype=torch.uint8)
