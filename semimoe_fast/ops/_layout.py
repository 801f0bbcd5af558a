"""Give tensors a memory layout that the kernels can address: one stride from pixel to pixel within a plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def addressable(x: Tensor) -> Tensor:
    """x (B, C, H, W) in place if its planes have one stride from pixel to pixel, else a contiguous copy."""
    height, width = x.shape[2:]
    in_planes = 1 in (height, width) or x.stride(2) == width * x.stride(3)
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if in_planes and not expanded:
        return x
    channels_last = x.stride(1) == 1 and not expanded
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Addressable tensors (B, C, H, W) with the same strides: in place if possible, else contiguous copies."""
    planes = [addressable(x) for x in tensors]
    same = all(x.stride() == planes[0].stride() for x in planes)
    return planes if same else [x.contiguous() for x in planes]
