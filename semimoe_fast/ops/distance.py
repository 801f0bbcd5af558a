"""The distance targets of the compiled module as custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native


@torch.library.custom_op("semimoe_fast::squared_distance", mutates_args=())
def squared_distance(labels: Tensor, instances: bool = False) -> Tensor:
    """labels: contiguous (B, H, W), bool or any integer -> int32 (B, H, W)."""
    out = torch.empty_like(labels, dtype=torch.int32)
    _native.squared_distance(labels, instances, out)
    return out


@squared_distance.register_fake
def _(labels: Tensor, instances: bool = False) -> Tensor:
    return torch.empty_like(labels, dtype=torch.int32)


@torch.library.custom_op("semimoe_fast::distance_targets", mutates_args=())
def distance_targets(labels: Tensor, ring_radius: float, instances: bool = False) -> tuple[Tensor, Tensor]:
    """labels: as `squared_distance` takes them -> sdf float32 (B, H, W), boundary uint8 (B, H, W)."""
    sdf = torch.empty_like(labels, dtype=torch.float32)
    boundary = torch.empty_like(labels, dtype=torch.uint8)
    _native.distance_targets(labels, instances, sdf, boundary, ring_radius)
    return sdf, boundary


@distance_targets.register_fake
def _(labels: Tensor, ring_radius: float, instances: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.float32), torch.empty_like(labels, dtype=torch.uint8)
