"""Memory layouts that the kernels can address."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def addressable(x: Tensor) -> Tensor:
    """x (B, C, H, W), or a copy, in whose planes every pixel is as far from the one before as the next."""
    height, width = x.shape[2:]
    return x if 1 in (height, width) or x.stride(2) == width * x.stride(3) else x.contiguous()


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (B, C, H, W), or contiguous copies, that are addressable in one and the same way."""
    planes = [addressable(x) for x in tensors]
    same = all(x.stride() == planes[0].stride() for x in planes)
    return planes if same else [x.contiguous() for x in planes]
