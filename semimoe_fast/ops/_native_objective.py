"""The objective on the CPU in float32, by the compiled module. kernels/objective.py is its counterpart on the GPU.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native

MOST_CLASSES = 255  # must equal that of csrc/objective_kernels.hpp
CLASSES = (torch.uint8, torch.bool)

View = tuple[int, int, int, int]  # address, and strides of image, channel and pixel in elements
Sizes = tuple[int, int, int, int]  # images, pixels per image, mask classes, boundary classes


def forward(
    predictions: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms (3,), and the coefficients alpha and beta (B, S (K + L)) that `backward` needs, in `dtype` (float32).

    predictions: S x (mask logits (B, K, H, W), raw sdf (B, 1, H, W), boundary logits (B, L, H, W)), float32; targets:
    mask (uint8 or bool), sdf (float32) and boundary (uint8 or bool), each (B, 1, H, W). Every plane must have one
    stride from pixel to pixel. Raises ValueError otherwise.
    """
    sizes, logits, views = _arguments(predictions, targets)
    columns = _columns(predictions, sizes)
    terms, alpha, beta = (
        torch.empty(shape, dtype=dtype, device="cpu") for shape in (3, (sizes[0], columns), (sizes[0], columns))
    )
    addresses = [_address(x, x.shape) for x in (terms, alpha, beta)]
    _native.on_cpu("objective_terms", sizes, logits, views, *addresses)
    return terms, alpha, beta


def backward(
    grad_output: Tensor,
    predictions: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor,
) -> list[list[Tensor]]:
    """Gradients of the predictions, with their shapes and strides.

    grad_output: float32 (3,); predictions and targets as `forward` takes them; alpha and beta as it returns them.
    """
    sizes, logits, views = _arguments(predictions, targets)
    columns = _columns(predictions, sizes)
    grad_output = grad_output.contiguous()
    gradients = [[torch.empty_like(x) for x in prediction] for prediction in predictions]
    shapes = (sizes[0], columns), (sizes[0], columns), (3,)
    addresses = [_address(x, shape) for x, shape in zip((alpha, beta, grad_output), shapes, strict=True)]
    outputs = [_view(x, x.shape) for gradient in gradients for x in gradient]
    _native.on_cpu("objective_gradients", sizes, logits, views, *addresses, outputs)
    return gradients


def _arguments(
    predictions: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]
) -> tuple[Sizes, list[View], list[View]]:
    """Sizes, and the addresses and strides of predictions and targets."""
    batch, _, height, width = predictions[0][0].shape
    channels = [x.shape[1] for x in predictions[0]]
    if channels[1] != 1 or not 1 <= min(channels) <= max(channels) <= MOST_CLASSES:
        raise ValueError(f"the native objective takes 1 to {MOST_CLASSES} classes and one sdf, got {channels} channels")
    logits = [
        _view(x, (batch, count, height, width))
        for prediction in predictions
        for x, count in zip(prediction, channels, strict=True)
    ]
    plane = (batch, 1, height, width)
    mask, sdf, boundary = targets
    views = [_view(mask, plane, CLASSES), _view(sdf, plane), _view(boundary, plane, CLASSES)]
    return (batch, height * width, channels[0], channels[2]), logits, views


def _columns(predictions: Sequence[Sequence[Tensor]], sizes: Sizes) -> int:
    return len(predictions) * sum(sizes[2:])


def _view(x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> View:
    _check(x, shape, dtypes)
    image, channel, row, column = x.stride()
    height, width = shape[2:]
    if row != width * column and height > 1 and width > 1:
        raise ValueError(f"a plane has one stride from pixel to pixel, got strides {x.stride()} of {tuple(shape)}")
    return x.data_ptr(), image, channel, column if width > 1 else row


def _address(x: Tensor, shape: Sequence[int]) -> int:
    _check(x, shape)
    if not x.is_contiguous():
        raise ValueError(f"alpha, beta and grad_output are contiguous, got strides {x.stride()} of {tuple(shape)}")
    return x.data_ptr()


def _check(x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    if x.shape != shape or x.dtype not in dtypes or not x.is_cpu:
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(
            f"expected {kinds} {tuple(shape)} on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device.type}"
        )
