"""csrc/distance.cu emulated on the CPU, for the tests of the distance operations."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from patience import run_patiently

from semimoe_fast.ops import _native, reference

Results = tuple[np.ndarray, np.ndarray, np.ndarray]  # squared distance, sdf, boundary


class Problem(ctypes.Structure):
    """semimoe::Problem of csrc/distance_cuda.hpp."""

    _fields_ = (
        ("mask", ctypes.c_void_p),
        ("element_size", ctypes.c_int),
        ("instances", ctypes.c_bool),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("words", ctypes.c_void_p),
        ("gaps", ctypes.c_void_p),
        ("far", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("squared", ctypes.c_void_p),
        ("squared_ring_radius", ctypes.c_int32),
        ("sdf", ctypes.c_void_p),
        ("boundary", ctypes.c_void_p),
    )


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """csrc/distance.cu, compiled for the CPU."""
    folder = Path(tempfile.mkdtemp(prefix="semimoe_fast-"))
    sources = Path(__file__).parents[1] / "cuda_on_cpu"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover", "-static-libubsan"]
    flags += ["-fno-strict-aliasing", "-shared", "-fPIC", f"-I{sources}"]
    run_patiently(["g++", *flags, sources / "distance.cpp", "-o", folder / "distance.so"], check=True)
    library = ctypes.CDLL(str(folder / "distance.so"))
    library.run.restype = ctypes.c_char_p
    library.take_iterations.restype = ctypes.c_uint64
    library.wrong_root.restype = ctypes.c_float
    library.wrong_root.argtypes = [ctypes.c_float, ctypes.c_float, ctypes.c_int]
    library.wrong_ratios.restype = library.wrong_random_ratios.restype = ctypes.c_int64
    shutil.rmtree(folder)
    return library


def launch(
    mask: np.ndarray, capability: int, *, instances: bool = False, ring_radius: float | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Launch a problem on an emulated GPU of a major compute capability; from 9 on it has clusters.

    mask: (B, H, W). Returns sdf and boundary or, without a ring radius, the squared distances. The seed shuffles the
    order of the threads.
    """
    mask = np.ascontiguousarray(mask)

    def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype)  # no correct result, so that an unwritten pixel fails

    if ring_radius is None:
        results = [filled(mask.shape, torch.int32)]
    else:
        results = [filled(mask.shape, torch.float32), filled(mask.shape, torch.uint8)]
    scratch = [filled(*scratch) for scratch in _native.scratch_of(*mask.shape)]
    problem = Problem(
        *(mask.ctypes.data, mask.itemsize, instances, *mask.shape),
        *(tensor.data_ptr() for tensor in scratch),
        *(results[0].data_ptr(), reference.squared_radius(ring_radius or 0)),
        *((None, None) if ring_radius is None else (result.data_ptr() for result in results)),
    )
    assert cuda_library().run(ctypes.byref(problem), capability, seed) is None
    return [result.numpy() for result in results]


def cuda_on_cpu(capability: int) -> Callable[..., Results]:
    """An engine on an emulated GPU. Two orders of its threads must give equal results."""

    def run(mask: np.ndarray, ring_radius: float = 2, instances: bool = False) -> Results:
        one, other = (
            launch(mask, capability, instances=instances, seed=seed)
            + launch(mask, capability, instances=instances, ring_radius=ring_radius, seed=seed)
            for seed in (0, 1)
        )
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
        return tuple(one)

    return run
