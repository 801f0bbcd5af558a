"""`python -m benchmarks.cuda_instructions`: instructions a pixel of csrc/distance.cu's cluster path, without a GPU.

nvcc compiles the kernels for sm_90, `sass.Machine` executes the machine code on a 256 x 256 mask of synthetic glands,
and the results are compared with those of the CPU kernels. Every instruction that a warp issues counts as 32
lane-instructions, also where a branch has switched some of the lanes off.
"""

from __future__ import annotations

import math
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from semimoe_fast import functional as F
from semimoe_fast.data.glands import glands
from semimoe_fast.ops import _native

from .launches import TOOLS
from .sass import LANES, Machine, Program

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "distance.cu"
CLUSTER_KERNEL = "distance_cluster_kernel"
SLAB_ROWS, TILE_COLUMNS, THREADS, WARPS = 32, 256, 256, 8
SHARED_MEMORY = 48 << 10
SDF_TOLERANCE = 2.0**-22  # the machine rounds some sums and estimates otherwise than the hardware
PARAMETERS = 0x210  # address of a kernel's parameters among the constants


def disassembly() -> str:
    """The machine code of distance.cu for sm_90."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", SOURCE, "-o", file.name]
        subprocess.run(command, check=True, capture_output=True)
        tool = [TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(tool, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Result:
    sdf: np.ndarray  # float32 (B, H, W)
    boundary: np.ndarray  # uint8 (B, H, W)
    instructions: int  # that warps issued

    @property
    def per_pixel(self) -> float:
        return self.instructions * LANES / self.sdf.size


def run(code: str, labels: np.ndarray, *, instances: bool = False, cluster: bool = True) -> Result:
    """Execute the cluster path or the general path for labels (B, H, W) and a ring radius of 2."""
    batch, height, width = labels.shape
    slabs, tiles = -(-height // SLAB_ROWS), -(-width // TILE_COLUMNS)
    scratch = [math.prod(shape) * dtype.itemsize for shape, dtype in _native.scratch_of(*labels.shape)]
    sizes = [labels.nbytes, 4 * labels.size, labels.size, *scratch]
    starts = [int(start) for start in np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)])]
    memory = np.full(starts[-1], 0xA5, np.uint8)
    memory[: labels.nbytes] = np.ascontiguousarray(labels).view(np.uint8).ravel()
    memory[starts[6] : starts[7]] = 0  # the state, which the launcher clears
    mask, sdf, boundary, *buffers = (Machine.base + start for start in starts[:-1])
    problem = struct.pack(
        "<Qi?3xqiiQQQQQi4xQQ",
        *(mask, labels.itemsize, instances, batch, height, width),
        *(*buffers, sdf, 4, sdf, boundary),
    )
    general = {
        "distance_read_kernel": batch * slabs * tiles,
        "distance_carry_kernel": -(-batch * width // THREADS),
        "distance_search_tiles_kernel": batch * slabs * tiles,
        "distance_search_far_kernel": batch * -(-height // WARPS),
        "distance_write_targets_kernel": batch * slabs * tiles,
    }
    instructions = 0
    for kernel, blocks in ({CLUSTER_KERNEL: batch * slabs} if cluster else general).items():
        machine = Machine(Program(code, kernel), bytes(PARAMETERS) + problem, memory, zip(starts, sizes, strict=False))
        machine.run(blocks, slabs if cluster else 1, THREADS, SHARED_MEMORY)
        instructions += machine.counts.total()
    return Result(
        memory[starts[1] :][: sizes[1]].view(np.float32).reshape(labels.shape),
        memory[starts[2] :][: sizes[2]].reshape(labels.shape),
        instructions,
    )


def main() -> None:
    code = disassembly()
    labels = glands(1, 256, seed=0)[1].numpy()
    result = run(code, labels)
    for found, expected in zip(
        (result.sdf, result.boundary), F.distance_targets(torch.from_numpy(labels)), strict=True
    ):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=SDF_TOLERANCE)
    print(f"{result.per_pixel:.1f} lane-instructions a pixel")


if __name__ == "__main__":
    main()
