"""Check the arguments of the public operations, and convert masks, targets and head weights to the form backends take.

Every error is one line: TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reference import INT32_MAX

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SIDE = 46_340  # the largest integer whose square int32 holds
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def label_batch(labels: Any, instances: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A mask or instance map as a contiguous (B, H, W) tensor, and a function that gives a result its shape.

    The tensor is bool or a signed integer type or uint8.
    """
    if not isinstance(instances, bool):
        raise TypeError(f"instances is {instances!r}: give True or False")
    tensor = _label_tensor(labels, instances)
    name = "an instance map" if instances else "a mask"
    if tensor.ndim not in (2, 3) and not (tensor.ndim == 4 and tensor.shape[1] == 1):
        raise ValueError(f"{name} is (B, 1, H, W), (B, H, W) or (H, W), got shape {tuple(tensor.shape)}")
    height, width = tensor.shape[-2:]
    if max(height, width) > MAX_SIDE or (height - 1) ** 2 + (width - 1) ** 2 > INT32_MAX:
        raise ValueError(
            f"{name} of {height} x {width} pixels is too large: int32 holds squared distances up to a side or "
            f"diagonal of {MAX_SIDE:,} pixels; cut it into tiles"
        )
    if tensor.ndim == 4:
        return tensor[:, 0].contiguous(), lambda result: result[:, None]
    if tensor.ndim == 3:
        return tensor.contiguous(), lambda result: result
    return tensor[None].contiguous(), lambda result: result[0]


def _label_tensor(labels: Any, instances: bool) -> Tensor:
    if isinstance(labels, Tensor):
        check_tensors(mask=labels)
        if labels.is_floating_point() or labels.is_complex():
            _require_labels(labels, instances, real=not labels.is_complex())
            return labels != 0
        # equal bits stay equal, and PyTorch has more operators for signed integers
        return labels.view(SIGNED.get(labels.dtype, labels.dtype))
    if isinstance(labels, np.ma.MaskedArray):
        raise TypeError("a masked array would lose its mask: give mask.filled(0)")
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind not in "biu":
            _require_labels(labels, instances, real=labels.dtype.kind == "f")
        # a new array, because torch takes no negative strides, other byte orders or read-only memory
        native = labels.astype(labels.dtype.newbyteorder("="), order="C") if instances else labels != 0
        return _label_tensor(torch.from_numpy(native), instances)
    if (shared := tensor_of(labels)) is not None:
        return _label_tensor(shared, instances)
    raise TypeError(f"a mask is a tensor or an array, got {type(labels).__name__}: use np.asarray(mask)")


def tensor_of(array: Any) -> Tensor | None:
    """A tensor with the memory of another library's array, ready on the current stream; None for other objects."""
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    if hasattr(array, "__cuda_array_interface__"):  # Numba's device arrays do not support DLPack
        _wait_for(array.__cuda_array_interface__.get("stream"))
        return torch.as_tensor(array, device="cuda")
    return None


def _wait_for(stream: int | None) -> None:
    """Make the current stream wait for that of a CUDA array, which `torch.as_tensor` ignores; None: no need to wait."""
    if stream in (1, 2):  # the default stream, and that of the thread, which torch.cuda.ExternalStream cannot name
        torch.cuda.synchronize()
    elif stream is not None:
        torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(stream))


def _require_labels(labels: Tensor | np.ndarray, instances: bool, real: bool) -> None:
    if instances:
        raise TypeError(
            f"an instance map holds integers, got dtype {labels.dtype}: convert ids, for example by .long()"
        )
    if not (real and is_binary(labels)):
        raise TypeError(
            f"a mask of dtype {labels.dtype} is ambiguous unless it holds only real 0 and 1: threshold it first, "
            "for example mask > 0.5"
        )


def is_binary(values: Tensor | np.ndarray) -> bool:
    """Whether all values are 0 or 1. On CUDA this synchronizes with the device; TypeError while a graph is captured."""
    if isinstance(values, Tensor) and values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise TypeError("floating-point labels cannot be checked while a CUDA graph is captured: use .to(torch.uint8)")
    return bool(((values == 0) | (values == 1)).all())


def check_tensors(*sequences: tuple[str, Any], **tensors: Any) -> list[tuple[str, Tensor]]:
    """The names and values of all arguments and of the items of sequences, which are dense tensors on one device.

    Raises TypeError for arguments or items that are not dense tensors, ValueError if devices differ.
    """
    every = [(name, x) for name, items in sequences for x in _items(name, items)] + list(tensors.items())
    for name, x in every:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(x).__name__}; use torch.as_tensor")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: a dense tensor is needed, got {x.layout}; use .to_dense()")
        first, expected = every[0][0], every[0][1].device
        if x.device != expected:
            raise ValueError(f"{name} is on {x.device}, {first} on {expected}: move them to one device with .to()")
    return every


def _items(name: str, sequence: Any) -> Iterable[Any]:
    if isinstance(sequence, Iterator):
        raise TypeError(f"{name}: a sequence of tensors is needed, got {type(sequence).__name__}; use list({name})")
    return sequence if isinstance(sequence, Iterable) else [sequence]


def check_floats(*sequences: tuple[str, Any], **tensors: Any) -> None:
    """As `check_tensors`; also raise TypeError for tensors that are not floating-point."""
    for name, x in check_tensors(*sequences, **tensors):
        _check_floating(name, x)


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: floating-point numbers are needed, got dtype {x.dtype}; use .float()")


def gate_matrices(
    features: Sequence[Tensor], gate_weights: Tensor, head_weights: Sequence[Tensor], head_biases: Sequence[Tensor]
) -> list[Tensor]:
    """Check the arguments of `multi_gate`; the head weights as (O_k, C) matrices."""
    check_floats(
        ("features", features),
        ("head_weights", head_weights),
        ("head_biases", head_biases),
        gate_weights=gate_weights,
    )
    check_features(features)
    _check_weights(gate_weights, (features[0].shape[0], len(head_weights), len(features)))
    matrices = head_matrices("head_weights", head_weights, features)
    check_biases("head_biases", head_biases, matrices)
    return matrices


def check_features(features: Sequence[Tensor]) -> None:
    if isinstance(features, Tensor):
        raise TypeError(f"features is a sequence of E tensors (B, C, H, W), got one tensor {tuple(features.shape)}")
    if not features or features[0].ndim != 4 or any(x.shape != features[0].shape for x in features):
        raise ValueError(f"features are E tensors of one shape (B, C, H, W), got {[tuple(x.shape) for x in features]}")
    if any(x.dtype != features[0].dtype for x in features):
        raise TypeError(f"features are E tensors of one dtype, got {[x.dtype for x in features]}")


def _check_weights(gate_weights: Tensor, expected: tuple[int, int, int]) -> None:
    if gate_weights.shape != expected:
        raise ValueError(f"gate_weights is (B, T, E) = {expected} here, got {tuple(gate_weights.shape)}")


def head_matrices(name: str, weights: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """1x1 convolution weights (O, C, 1, 1) or (O, C) as matrices (O, C), checked against the features."""
    channels = features[0].shape[1]
    if any(tuple(weight.shape[1:]) not in ((channels,), (channels, 1, 1)) for weight in weights):
        raise ValueError(f"{name} are (O, {channels}) for these features, got {[tuple(w.shape) for w in weights]}")
    return [weight.flatten(1) for weight in weights]


def check_biases(name: str, biases: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    if [tuple(bias.shape) for bias in biases] != [(len(matrix),) for matrix in matrices]:
        rows = [len(matrix) for matrix in matrices]
        raise ValueError(f"{name} match the rows {rows} of the weights, got {[tuple(bias.shape) for bias in biases]}")


def check_projections(projections: Tensor, gate_weights: Tensor, head_biases: Sequence[Tensor]) -> None:
    check_floats(("head_biases", head_biases), projections=projections, gate_weights=gate_weights)
    if any(bias.ndim != 1 for bias in head_biases):
        raise ValueError(f"head_biases are (O,), got {[tuple(bias.shape) for bias in head_biases]}")
    rows = [len(bias) for bias in head_biases]
    if projections.ndim != 5 or projections.shape[2] != sum(rows):
        raise ValueError(f"projections are (B, E, {sum(rows)}, H, W) for these biases, got {tuple(projections.shape)}")
    _check_weights(gate_weights, (projections.shape[0], len(rows), projections.shape[1]))


def check_tasks(name: str, heads: Sequence[Tensor]) -> None:
    rows = [len(head) for head in heads]
    if len(rows) != 3 or rows[1] != 1:
        raise ValueError(f"{name} takes the heads of mask (K), sdf (1) and boundary (2 rows), got rows {rows}")
    if max(rows) > 256:
        raise ValueError(f"{name} gives labels in uint8, so a head has at most 256 rows, got rows {rows}")


def objective_targets(
    name: str,
    mask_logits: Tensor,
    raw_sdf: Tensor,
    boundary_logits: Tensor,
    mask: Tensor,
    sdf: Tensor,
    boundary: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of `objective_terms`; the targets with mask and boundary as integers (B, H, W)."""
    check_tensors(
        mask_logits=mask_logits,
        raw_sdf=raw_sdf,
        boundary_logits=boundary_logits,
        mask=mask,
        sdf=sdf,
        boundary=boundary,
    )
    mask = class_target(f"{name}: mask", mask_logits, mask)
    check_sdf(raw_sdf, sdf)
    boundary = class_target(f"{name}: boundary", boundary_logits, boundary)
    if not mask.shape == boundary.shape == (raw_sdf.shape[0], *raw_sdf.shape[2:]):
        raise ValueError(
            f"{name}: mask, sdf and boundary are of the same images, got {tuple(mask.shape)}, {tuple(sdf.shape)} and "
            f"{tuple(boundary.shape)}"
        )
    return mask, sdf, boundary


def class_target(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """Check logits (B, K, H, W) and their target (B, H, W) or (B, 1, H, W); the target as integers (B, H, W)."""
    batch, per_pixel = logits.shape[:1], (*logits.shape[:1], *logits.shape[2:])
    if logits.ndim != 4 or tuple(target.shape) not in (per_pixel, (*batch, 1, *logits.shape[2:])):
        raise ValueError(
            f"{name}: logits (B, K, H, W) and target (B, H, W) or (B, 1, H, W) disagree: {tuple(logits.shape)}, "
            f"{tuple(target.shape)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"{name}: logits of {logits.shape[1]} channel(s) have no gradient, softmax needs at least 2: give "
            "background and foreground, for one channel x torch.cat([torch.zeros_like(x), x], 1)"
        )
    _check_floating(f"{name}: logits", logits)
    if target.is_floating_point() or target.is_complex():
        if target.is_complex() or not is_binary(target):
            raise TypeError(
                f"{name}: the target holds class numbers, got dtype {target.dtype} with values other than 0 and 1; "
                "use target.long()"
            )
        target = target.to(torch.uint8)
    return target.reshape(per_pixel)


def check_sdf(raw: Tensor, sdf: Tensor) -> None:
    _check_floating("the raw sdf", raw)
    if sdf.is_complex() or sdf.dtype == torch.bool:
        raise TypeError(f"the sdf is of dtype {sdf.dtype}: give real numbers")
    per_image = (*raw.shape[:1], *raw.shape[2:])
    if raw.ndim != 4 or raw.shape[1] != 1 or tuple(sdf.shape) not in (tuple(raw.shape), per_image):
        raise ValueError(
            f"raw (B, 1, H, W) and sdf (B, 1, H, W) or (B, H, W) disagree: {tuple(raw.shape)}, {tuple(sdf.shape)}"
        )


def check_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    groups: int,
    training: bool,
    skip: Tensor | None,
) -> None:
    if not isinstance(groups, int) or not isinstance(training, bool):
        raise TypeError(f"groups is {groups!r} and training {training!r}: give an integer, and True or False")
    if not isinstance(eps, Real) or not isinstance(momentum, Real):
        raise TypeError(f"eps is {eps!r} and momentum {momentum!r}: give numbers")
    tensors = {"x": x, "weight": weight, "bias": bias}
    running = {"running_mean": running_mean, "running_var": running_var}
    if running_mean is not None or running_var is not None:
        tensors |= running
    elif not training:
        raise ValueError("evaluation needs running_mean and running_var, got None: give them, or training=True")
    check_floats(**tensors)
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if x.ndim != 4 or any(shape != (x.shape[1],) for shape in shapes[1:]):
        raise ValueError(f"x is (B, C, H, W), and {', '.join([*tensors][1:])} are (C,), got {shapes}")
    if skip is not None:
        check_floats(skip=skip)
        check_tensors(x=x, skip=skip)
        if skip.ndim != 4 or (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(f"skip is {tuple(skip.shape)} and x {tuple(x.shape)}: give (B, S, H, W) for (B, C, H, W)")
    if not training:
        return
    if groups < 1 or x.shape[0] % groups != 0:
        raise ValueError(f"groups is {groups}, but {x.shape[0]} images are no {groups} equal runs: give a divisor")
    if x.numel() // max(x.shape[1], 1) // groups < 2:
        raise ValueError(
            f"training needs more than 1 value per channel in each run, got {tuple(x.shape)} in {groups} run(s): "
            "give larger batches, or training=False"
        )


def check_fold_upsampling(weights: Sequence[Tensor], dtype: torch.dtype | None) -> None:
    check_floats(("weights", weights))
    if isinstance(weights, Tensor) or any(weight.ndim != 4 or weight.shape[2:] != (3, 3) for weight in weights):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights is a sequence of tensors (O, C, 3, 3), got {got}")
    if any(weight.numel() == 0 for weight in weights):
        raise ValueError(f"weights have outputs and channels, got {[tuple(weight.shape) for weight in weights]}")
    if any(weight.dtype != weights[0].dtype for weight in weights):
        raise TypeError(f"weights have one dtype, got {[weight.dtype for weight in weights]}: convert them with .to()")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}: give a floating-point type, such as torch.bfloat16")
