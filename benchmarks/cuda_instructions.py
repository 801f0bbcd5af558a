"""`python -m benchmarks.cuda_instructions`: instructions a pixel of the cluster kernel of csrc/distance.cu, without a GPU.

nvcc compiles the kernel for sm_90, `sass.Machine` executes its machine code on a 256 x 256 mask of synthetic glands, and
the results are compared with those of the CPU kernels. A lane-instruction is an instruction that a warp issues, divided
by 32 lanes; the count includes the lanes that a branch has switched off.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from semimoe_fast import functional as F
from semimoe_fast.data.glands import glands

from .launches import TOOLS
from .sass import LANES, Machine, Program

ROOT = Path(__file__).parents[1]
KERNEL = "distance_cluster_kernel"
SLAB_ROWS, THREADS = 32, 256
SHARED_MEMORY = 60 << 10
PARAMETERS = 0x210  # address of the kernel's parameters among the constants


def disassembly(source: Path) -> str:
    """The machine code of distance.cu for sm_90."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", source, "-o", file.name]
        subprocess.run(command, check=True, capture_output=True)
        tool = [TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(tool, check=True, capture_output=True, text=True).stdout


def run(
    program: Program, labels: np.ndarray, *, instances: bool = False, squared_ring_radius: int = 4
) -> tuple[Machine, np.ndarray, np.ndarray]:
    """Execute the kernel on labels (B, H, W). Returns the machine, sdf float32 and boundary uint8 (B, H, W)."""
    batch, height, width = labels.shape
    sizes = [labels.nbytes, 4 * labels.size, labels.size]
    starts = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)])
    memory = np.zeros(starts[-1], np.uint8)
    memory[: labels.nbytes] = np.ascontiguousarray(labels).view(np.uint8).ravel()
    mask, sdf, boundary = (Machine.base + int(start) for start in starts[:3])
    scratch = (0,) * 4
    problem = struct.pack(
        "<Qi?3xqiiQQQQQi4xQQ",
        *(mask, labels.itemsize, instances, batch, height, width, *scratch, sdf, squared_ring_radius, sdf, boundary),
    )
    machine = Machine(program, bytes(PARAMETERS) + problem, memory)
    machine.run(batch, -(-height // SLAB_ROWS), THREADS, SHARED_MEMORY)
    return (
        machine,
        memory[starts[1] :][: sizes[1]].view(np.float32).reshape(labels.shape),
        memory[starts[2] :][: sizes[2]].reshape(labels.shape),
    )


def check(labels: np.ndarray, sdf: np.ndarray, boundary: np.ndarray) -> None:
    """Compare with the CPU kernels. The machine's rounding differs from the hardware's."""
    expected_sdf, expected_boundary = F.distance_targets(torch.from_numpy(labels))
    np.testing.assert_allclose(sdf, expected_sdf.numpy(), rtol=0, atol=2.0**-22)
    np.testing.assert_array_equal(boundary, expected_boundary.numpy())


def per_pixel(machine: Machine, pixels: int) -> float:
    return sum(machine.counts.values()) * LANES / pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT / "csrc" / "distance.cu", help="the file to compile")
    program = Program(disassembly(parser.parse_args().source), KERNEL)
    labels = glands(1, 256, seed=0)[1].numpy()
    machine, sdf, boundary = run(program, labels)
    check(labels, sdf, boundary)
    print(f"{per_pixel(machine, labels.size):.1f} lane-instructions a pixel")


if __name__ == "__main__":
    main()
