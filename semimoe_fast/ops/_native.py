"""Load the compiled module, check that it fits this package, and call it on tensors.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ._backend import BackendError, forced_backend
from .reference import squared_radius

ABI = 8  # must equal the ABI of csrc/bindings.cpp
REMEDY = "run `pip install .` in the project's folder"
SLAB_ROWS, TILE_COLUMNS, PLANES = 32, 256, 5  # must equal those of csrc/distance_cuda.hpp and csrc/general_path.cuh


def module() -> ModuleType | None:
    """The compiled module, or None if it is missing or has another ABI."""
    return _load()[0]


def why_missing() -> str:
    """The reason in one line why `module` returns None, with the remedy; empty if it does not."""
    return _load()[1]


def why_unavailable(device_type: str) -> str | None:
    """The reason in one line why the compiled module cannot serve "cpu" or "cuda" tensors; None if it can."""
    native = module()
    if native is None:
        return why_missing()
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"the compiled module serves cpu and cuda tensors, not {device_type}"
    if native.built_with["cuda"] is None:
        return f"the compiled module was built without CUDA: {REMEDY} where nvcc is installed"
    return _why_no_gpu(native.built_with["cuda_archs"]) or _why_old_driver(native)


def module_for(device_type: str) -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason if it cannot serve tensors on that device."""
    reason = why_unavailable(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    return _load()[0]


def on_cpu(function: str, *arguments: Any) -> None:
    """Call a function of the compiled module for CPU tensors, on PyTorch's number of threads."""
    getattr(module_for("cpu"), function)(*arguments, instruction_set(), torch.get_num_threads())


def serves_cpu() -> bool:
    """Whether the compiled module computes parts of operations on CPU tensors, such as pooling and blur.

    Raises BackendError if the caller asks for the fused backend and there is no module.
    """
    forced = forced_backend()
    if forced not in (None, "fused"):
        return False
    reason = why_unavailable("cpu")
    if forced is not None and reason is not None:
        raise BackendError(f"the fused backend cannot serve on cpu: {reason}; choose another backend")
    return reason is None


def instruction_set() -> str:
    """The instruction set of the CPU kernels: SEMIMOE_SIMD, or by default the best of this processor.

    Raises UserError if SEMIMOE_SIMD names one that this processor or build lacks.
    """
    available = _load()[0].instruction_sets
    wanted = os.environ.get("SEMIMOE_SIMD", available[0])
    if wanted not in available:
        raise UserError(f"SEMIMOE_SIMD={wanted!r}: choose one of {', '.join(available)}, or unset it")
    return wanted


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `archs`, such as "80 90", run on a GPU of a compute capability, such as (8, 6).

    Machine code runs on GPUs with the same major version and the same or a higher minor version. The PTX of the last
    architecture runs on all later GPUs. Code for "90a" runs on (9, 0) only, code for "100f" within major version 10.
    """

    def version(arch: str) -> tuple[int, int]:
        return divmod(int(arch.rstrip("af")), 10)

    def has_machine_code(arch: str) -> bool:
        if arch.endswith("a"):
            return capability == version(arch)
        return version(arch) <= capability < (version(arch)[0] + 1, 0)

    *_, last = built = archs.split()
    return any(map(has_machine_code, built)) or (last.isdecimal() and capability >= version(last))


def squared_distance(labels: Tensor, instances: bool, out: Tensor) -> None:
    """Write the squared distance of every pixel to the nearest pixel of another label, or -1 without such a pixel.

    labels: (B, H, W), bool or any integer, 0 is background; with instances every other value is a label of its own,
    else all are one; out: int32 (B, H, W). Both are contiguous and on one device. On a GPU the kernels are queued on
    the current stream. Raises ValueError if the image diagonal exceeds 46,340 pixels.
    """
    _check(labels, out=(out, torch.int32))
    if labels.is_cuda:
        _distance_cuda(module_for("cuda"), labels, instances, squared=out)
    else:
        on_cpu("squared_distance", *_labels(labels, instances), out.data_ptr())


def distance_targets(labels: Tensor, instances: bool, sdf: Tensor, boundary: Tensor, ring_radius: float) -> None:
    """Write the normalized signed distance, and the background ring within `ring_radius` pixels of the foreground.

    With instances, the boundary also has the foreground pixels with another instance above, below, left or right.

    labels: as `squared_distance` takes it; sdf: float32 (B, H, W); boundary: uint8 (B, H, W). All are contiguous and on
    one device. Stream and errors as `squared_distance`.
    """
    _check(labels, sdf=(sdf, torch.float32), boundary=(boundary, torch.uint8))
    if labels.is_cuda:
        native = module_for("cuda")
        _distance_cuda(native, labels, instances, squared=sdf, ring_radius=ring_radius, sdf=sdf, boundary=boundary)
    else:
        outputs = sdf.data_ptr(), boundary.data_ptr()
        on_cpu("distance_targets", *_labels(labels, instances), squared_radius(ring_radius), *outputs)


def _labels(labels: Tensor, instances: bool) -> tuple[int, ...]:
    return labels.data_ptr(), labels.element_size(), instances, *labels.shape


def _distance_cuda(
    native: ModuleType,
    labels: Tensor,
    instances: bool,
    squared: Tensor,
    ring_radius: float = 0,
    sdf: Tensor | None = None,
    boundary: Tensor | None = None,
) -> None:
    scratch = [torch.empty(shape, dtype=dtype, device=labels.device) for shape, dtype in scratch_of(*labels.shape)]
    with torch.cuda.device(labels.device):
        native.distance_cuda(
            *_labels(labels, instances),
            *(tensor.data_ptr() for tensor in scratch),
            squared.data_ptr(),
            squared_radius(ring_radius),
            sdf.data_ptr() if sdf is not None else 0,
            boundary.data_ptr() if boundary is not None else 0,
            torch.cuda.current_stream().cuda_stream,
        )


def scratch_of(batch: int, height: int, width: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the scratch buffers words, gaps, far and state in csrc/distance_cuda.hpp."""
    slabs, tiles = -(-height // SLAB_ROWS), -(-width // TILE_COLUMNS)
    return [
        ((PLANES, batch, slabs, width), torch.int32),
        ((batch, height, width), torch.int16),
        ((batch, slabs, tiles), torch.int32),
        ((batch, 3), torch.int32),
    ]


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        native = importlib.import_module("_semimoe_fast")
    except ImportError as error:
        return None, f"the compiled module cannot be imported ({error}): {REMEDY}"
    if native.abi != ABI:
        return None, f"the compiled module has ABI {native.abi}, but this package needs {ABI}: {REMEDY}"
    return native, ""


_load()  # not on first use, which may be in a forked child: csrc/parallel.hpp must know the process before


@functools.cache
def _why_no_gpu(archs: str) -> str | None:
    """The reason in one line why kernels built for `archs` cannot serve all GPUs of PyTorch; None if they can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        return f"PyTorch cannot use CUDA: {str(error).splitlines()[0]}"
    for major, minor in capabilities:
        if not runs_on(archs, (major, minor)):
            gpu = f"{major}{minor}"
            return f"the compiled module was built for sm {archs}, not {gpu}: {REMEDY} with {gpu} in SEMIMOE_CUDA_ARCHS"
    return None


def _why_old_driver(native: ModuleType) -> str | None:
    """A driver runs programs of its own major version of CUDA and of older ones."""
    built, driver = native.built_with["cuda"], native.driver_version()
    if driver // 1000 >= int(built.split(".")[0]):
        return None
    newest = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"the compiled module was built with CUDA {built}, but the driver runs CUDA {newest} at most: "
        f"update the driver, or {REMEDY} with an older nvcc"
    )


def _check(labels: Tensor, **outputs: tuple[Tensor, torch.dtype]) -> None:
    integer = not (labels.is_floating_point() or labels.is_complex())
    if labels.ndim != 3 or not integer or not labels.is_contiguous():
        raise ValueError(f"labels are contiguous bool or integer (B, H, W), got {labels.dtype} {tuple(labels.shape)}")
    for name, (output, dtype) in outputs.items():
        if output.shape != labels.shape or output.dtype != dtype or not output.is_contiguous():
            raise ValueError(
                f"{name} is contiguous {dtype} {tuple(labels.shape)}, got {output.dtype} {tuple(output.shape)}"
            )
        if output.device != labels.device:
            raise ValueError(f"{name} is on {output.device}, the labels on {labels.device}: put them on one device")
