"""The machine code of the CUDA distance kernels, executed on the CPU: its results, and its instructions a pixel."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from emulated_cuda import launch

from semimoe_fast.data.glands import glands

pytest.importorskip("triton")  # has nvdisasm
cuda_instructions = pytest.importorskip(
    "benchmarks.cuda_instructions", reason="needs the source tree, and tests run from its root"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="nvcc or g++ was not found"),
]

MOST_PER_PIXEL = 150  # lane-instructions; nvcc 13.0 needs 123


@pytest.fixture(scope="module")
def code() -> str:
    return cuda_instructions.disassembly()


def dot(height: int, width: int) -> np.ndarray:
    mask = np.zeros((1, height, width), np.uint8)
    mask[0, 3, 3] = 1
    return mask


def squares(height: int, width: int, size: int) -> np.ndarray:
    labels = np.random.default_rng(0).integers(0, 4, (2, height // size + 1, width // size + 1))
    return labels.repeat(size, 1).repeat(size, 2)[:, :height, :width]


CASES = {
    "odd width": squares(45, 77, 11).astype(np.uint8),
    "64-bit values": squares(33, 64, 9) << 40,
    "16-bit values": squares(33, 64, 9).astype(np.int16),
    "long distances": dot(36, 256),
    "two tiles": dot(20, 300),
    "background": np.zeros((1, 20, 8), np.uint8),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("cluster", [False, True])
def test_machine_code_equals_the_emulation(code: str, name: str, instances: bool, cluster: bool) -> None:
    labels = CASES[name]
    if cluster and labels.shape[2] > 256:
        pytest.skip("the cluster path takes images up to 256 x 256")
    result = cuda_instructions.run(code, labels, instances=instances, cluster=cluster)
    sdf, boundary = launch(labels, 9 if cluster else 8, instances=instances, ring_radius=2)
    np.testing.assert_allclose(result.sdf, sdf, rtol=0, atol=cuda_instructions.SDF_TOLERANCE)
    np.testing.assert_array_equal(result.boundary, boundary)


def test_instructions_of_the_cluster_path(code: str) -> None:
    mask = glands(1, 256, seed=0)[1].numpy()
    result = cuda_instructions.run(code, mask)
    np.testing.assert_array_equal(result.boundary, launch(mask, 9, ring_radius=2)[1])
    assert result.per_pixel <= MOST_PER_PIXEL
