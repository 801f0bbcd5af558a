"""Give feature maps a memory layout that the kernels can address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def addressable(x: Tensor) -> Tensor:
    """x (B, C, H, W) in place if its planes have one stride from pixel to pixel, else a copy that is dense."""
    height, width = x.shape[2:]
    in_planes = 1 in (height, width) or x.stride(2) == width * x.stride(3)
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if in_planes and not expanded:
        return x
    channels_last = x.stride(1) == 1 and not expanded
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def dense(x: Tensor) -> Tensor:
    """x (B, C, H, W) in place if it is contiguous or channels-last, else a copy that is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Addressable tensors (B, C, H, W) with the same strides: in place if possible, else contiguous copies."""
    planes = [addressable(x) for x in tensors]
    same = all(x.stride() == planes[0].stride() for x in planes)
    return planes if same else [x.contiguous() for x in planes]
