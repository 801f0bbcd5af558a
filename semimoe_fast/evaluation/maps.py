"""Masks and instance maps from tensors and arrays of any library, as NumPy arrays on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..ops._arguments import tensor_of


def array_pair(prediction: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth as (B, H, W) arrays of bool or an integer dtype; (H, W) becomes (1, H, W).

    Raises TypeError for floating-point values and for anything but an array, ValueError for other shapes.
    """
    predicted, true = _array("prediction", prediction), _array("truth", truth)
    if predicted.shape != true.shape:
        raise ValueError(f"prediction and truth are of the same images, got shapes {predicted.shape} and {true.shape}")
    if predicted.ndim not in (2, 3):
        raise ValueError(
            f"prediction and truth are (B, H, W) or (H, W), got shape {predicted.shape}; of (B, 1, H, W) give x[:, 0]"
        )
    return (predicted, true) if predicted.ndim == 3 else (predicted[None], true[None])


def _array(name: str, x: Any) -> np.ndarray:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, which would lose its mask: give {name}.filled(0)")
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biu":
            raise TypeError(_ambiguous(name, x.dtype))
        return x
    if isinstance(x, Tensor):
        if x.is_floating_point() or x.is_complex():
            raise TypeError(_ambiguous(name, x.dtype))
        return x.cpu().numpy()
    if (shared := tensor_of(x)) is not None:
        return _array(name, shared)
    raise TypeError(f"{name} is a tensor or an array, got {type(x).__name__}: use np.asarray({name})")


def _ambiguous(name: str, dtype: Any) -> str:
    return (
        f"{name} of dtype {dtype} is ambiguous: give instances as integers, or threshold a mask first, for example "
        f"{name} > 0.5"
    )
