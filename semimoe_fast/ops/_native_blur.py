"""Symmetric separable blur on the CPU, by the compiled module. data/appearance.py has its counterpart for the GPU.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native


def convolve_(images: Tensor, kernel: Tensor) -> None:
    """Convolve columns and rows of images with a symmetric kernel each, in place, mirrored at the borders.

    images: contiguous float32 (B, C, H, W); kernel: float32 (B, R + 1), weights at the distances 0 to R. Raises
    ValueError for other tensors, and RuntimeError, as PyTorch's padding does, unless R is less than H and W.
    """
    kernel = kernel.contiguous()
    tensors = images, kernel
    if (images.ndim, kernel.ndim) != (4, 2) or len(images) != len(kernel) or not all(map(_serves, tensors)):
        raise ValueError(
            "a blur takes contiguous float32 images (B, C, H, W) and float32 weights (B, R + 1) on the CPU, got "
            + " and ".join(f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device.type}" for x in tensors)
        )
    _native.on_cpu("blur", images.shape, images.data_ptr(), kernel.data_ptr(), kernel.shape[1] - 1)


def _serves(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()
