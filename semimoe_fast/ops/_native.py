"""Load the compiled module, check that it fits this package, and call it on tensors.

The compiled module takes addresses instead of tensors, so this file checks device, dtype, shape and layout.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UserError

ABI = 4  # must equal the ABI of csrc/bindings.cpp
REMEDY = "run `pip install .` in the project's folder"
INT32_MAX = 2**31 - 1
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
    return _why_no_gpu(native.built_with["cuda_archs"])


def module_for(device_type: str) -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason if it cannot serve tensors on that device."""
    reason = why_unavailable(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    return _load()[0]


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


def squared_distance(mask: Tensor, out: Tensor) -> None:
    """Write the squared distance of every pixel to the nearest pixel of the opposite class, or -1 without such a pixel.

    mask: (B, H, W), non-zero is foreground, uint8 or bool on the CPU, bool or any integer on a GPU; out: int32
    (B, H, W). Both are contiguous and on one device. On a GPU the kernels are queued on the current stream. Raises
    ValueError if the image diagonal exceeds 46,340 pixels.
    """
    native = module_for(mask.device.type)
    _check(mask, out=(out, torch.int32))
    if mask.is_cuda:
        _distance_cuda(native, mask, instances=False, squared=out)
    else:
        native.squared_distance(
            mask.data_ptr(), *mask.shape, out.data_ptr(), instruction_set(), torch.get_num_threads()
        )


def distance_targets(mask: Tensor, sdf: Tensor, boundary: Tensor, ring_radius: float) -> None:
    """Write the normalized signed distance, and the background ring within `ring_radius` pixels of the foreground.

    mask: as `squared_distance` takes it; sdf: float32 (B, H, W); boundary: uint8 (B, H, W). All are contiguous and on
    one device. Stream and errors as `squared_distance`.
    """
    native = module_for(mask.device.type)
    _check(mask, sdf=(sdf, torch.float32), boundary=(boundary, torch.uint8))
    if mask.is_cuda:
        _distance_cuda(native, mask, instances=False, squared=sdf, ring_radius=ring_radius, sdf=sdf, boundary=boundary)
    else:
        native.distance_targets(
            mask.data_ptr(),
            *mask.shape,
            squared_radius(ring_radius),
            sdf.data_ptr(),
            boundary.data_ptr(),
            instruction_set(),
            torch.get_num_threads(),
        )


def _distance_cuda(
    native: ModuleType,
    mask: Tensor,
    instances: bool,
    squared: Tensor,
    ring_radius: float = 0,
    sdf: Tensor | None = None,
    boundary: Tensor | None = None,
) -> None:
    scratch = [torch.empty(shape, dtype=dtype, device=mask.device) for shape, dtype in scratch_of(*mask.shape)]
    with torch.cuda.device(mask.device):
        native.distance_cuda(
            mask.data_ptr(),
            mask.element_size(),
            instances,
            *mask.shape,
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


def squared_radius(radius: float) -> int:
    """The largest int32 that is at most radius^2."""
    return math.floor(min(radius * radius, INT32_MAX))


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        native = importlib.import_module("_semimoe_fast")
    except ImportError as error:
        return None, f"the compiled module cannot be imported ({error}): {REMEDY}"
    if native.abi != ABI:
        return None, f"the compiled module has ABI {native.abi}, but this package needs {ABI}: {REMEDY}"
    return native, ""


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


def _check(mask: Tensor, **outputs: tuple[Tensor, torch.dtype]) -> None:
    integer = not (mask.is_floating_point() or mask.is_complex())
    readable = integer if mask.is_cuda else mask.dtype in (torch.uint8, torch.bool)
    if mask.ndim != 3 or not readable or not mask.is_contiguous():
        kind = "any integer" if mask.is_cuda else "uint8 or bool"
        raise ValueError(f"mask is contiguous {kind} (B, H, W), got {mask.dtype} {tuple(mask.shape)}")
    for name, (output, dtype) in outputs.items():
        if output.shape != mask.shape or output.dtype != dtype or not output.is_contiguous():
            raise ValueError(
                f"{name} is contiguous {dtype} {tuple(mask.shape)}, got {output.dtype} {tuple(output.shape)}"
            )
        if output.device != mask.device:
            raise ValueError(f"{name} is on {output.device}, mask on {mask.device}: put them on one device")
