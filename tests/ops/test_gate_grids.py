"""Large tensors in the Triton kernels of the multi-gate and the objective: 64-bit addresses and the limits of grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from semimoe_fast.kernels import mix_projections, objective, project_experts

ROWS = (2, 1, 2)


def test_rows_beyond_32_bits() -> None:
    """The third row of the projections starts 2^31 elements after the first; most of the memory is never touched."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter checks the addresses without 8 GiB of a GPU's memory")
    pixels, used = 2**30, 4  # the pixels of one program, at the start of each plane
    projections = torch.from_numpy(np.empty(3 * pixels, np.float32))
    outputs = torch.from_numpy(np.empty(3 * pixels, np.float32))
    for row in range(3):
        projections[row * pixels : row * pixels + used] = row + 1
    mix_projections.mix_projections_fwd_kernel[(1, 1)](
        projections, torch.ones(1, 1, 1), torch.zeros(3), (outputs,), pixels, (3,), (0,), 3, 1, used
    )  # fmt: skip
    assert outputs[::pixels].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("batch", "side"), [(2**18, 1), (1, 2**14)])
def test_grids_stay_within_the_limits_of_cuda(batch: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits the second and third axis to 65,535. The tensors are on the meta device; nothing is launched."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *_, **__: None

    for module in (project_experts, mix_projections, objective):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder())

    def empty(channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(batch, channels, side, side, dtype=dtype, device="meta")

    features, own, gated = [[empty(channels) for channels in rows] for rows in ((4, 4, 4), ROWS, ROWS)]
    weights, biases = torch.empty(10, 4, device="meta"), torch.empty(5, device="meta")
    gates, projections = torch.empty(batch, 3, 3, device="meta"), torch.empty(batch, 3, 5, side, side, device="meta")
    project_experts.forward(features, weights, biases, ROWS)
    project_experts.backward(features, weights, ROWS, None, projections, own)
    mix_projections.forward(projections, gates, biases, ROWS)
    mix_projections.labels(projections, gates, biases, 2)
    mix_projections.backward(projections, gates, gated)
    targets, sums = [empty(1, torch.uint8), empty(1), empty(1, torch.uint8)], torch.empty(batch, 8, device="meta")
    objective.forward([own, gated], targets, torch.float32)
    objective.backward(biases[:3], [own, gated], targets, sums, sums)
    # the least for each of seven kernels; the finish kernel of the objective adds one program
    programs = batch * max(side * side // 1024, 1)
    assert sum(map(math.prod, grids)) >= 7 * programs + 1
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535 for grid in grids), grids
