"""Large tensors in the Triton kernels: 64-bit addresses and the limits of grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from semimoe_fast.ops import _triton

pytest.importorskip("triton")

import triton.language as tl
from semimoe_fast.kernels import batch_norm, mix_projections, objective, project_experts
from semimoe_fast.kernels._tiling import Tiling

ROWS = (2, 1, 2)
launches = pytest.mark.skipif(bool(_triton.why_unavailable("cpu")), reason=str(_triton.why_unavailable("cpu")))


@launches
def test_rows_beyond_32_bits() -> None:
    """The third row of the projections starts 2^31 elements after the first; most of the memory is never touched."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter checks the addresses without 8 GiB of a GPU's memory")
    pixels, used = 2**30, 4  # the pixels of one program, at the start of each plane
    projections = torch.from_numpy(np.empty(3 * pixels, np.float32))
    outputs = torch.from_numpy(np.empty(3 * pixels, np.float32))
    for row in range(3):
        projections[row * pixels : row * pixels + used] = row + 1
    mix_projections.mix_projections_fwd_kernel[(1,)](
        projections, torch.ones(1, 1, 1), torch.zeros(3), (outputs,), pixels, (3,), (0,), 3, 1, used
    )  # fmt: skip
    assert outputs[::pixels].tolist() == [1, 2, 3]


@launches
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_beyond_32_bits(channels_last: bool) -> None:
    """The last plane (NCHW) or the second group (channels-last) starts 2^31 elements after the first."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter checks the addresses without 16 GiB of a GPU's memory")
    pixels, used = 2**30, 4  # one program for `used` pixels at the start of each plane or group
    groups, channels = (2, 2) if channels_last else (1, 3)
    starts = range(0, groups * channels * pixels, channels * pixels if channels_last else pixels)
    run = used * channels if channels_last else used
    x, y = (torch.from_numpy(np.empty(groups * channels * pixels, np.float32)) for _ in range(2))
    for value, start in enumerate(starts, 1):
        x[start : start + run] = value
    tiling = Tiling(1, pixels, 1, *map(tl.constexpr, (channels, channels_last, used, 2 if channels_last else 1, 1)))
    means, squares = (torch.zeros(groups, 1, channels) for _ in range(2))
    references = torch.zeros(groups, channels)
    grid = (len(starts),)
    batch_norm.batch_norm_relu_sums_fwd_kernel[grid](x, means, squares, references, tiling)
    assert references.flatten().tolist() == ([1, 1, 2, 2] if channels_last else [1, 2, 3])
    assert not means.any()
    assert not squares.any()
    parameters = batch_norm.Parameters(torch.ones(3), torch.zeros(3), torch.zeros(6), torch.ones(6))
    batch_norm.batch_norm_relu_fwd_kernel[grid](x, y, parameters, tiling)
    for value, start in enumerate(starts, 1):
        assert y[start : start + run].tolist() == [value] * run


@pytest.mark.parametrize(("batch", "side"), [(2**18, 1), (1, 2**14)])
def test_grids_stay_within_the_limits_of_cuda(batch: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits the second and third axis to 65,535. The tensors are on the meta device; nothing is launched."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *_, **__: None

    for module in (project_experts, mix_projections, objective, batch_norm):
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
    for layout in (torch.contiguous_format, torch.channels_last):
        x, statistics = empty(4).contiguous(memory_format=layout), torch.empty(2, 4, device="meta")
        batch_norm.batch_norm_relu_fwd(x, weights[0], weights[0], 1e-5, 2)
        batch_norm.batch_norm_relu_bwd(x, x, weights[0], weights[0], statistics, statistics, 2)
    # the least for each of seven kernels; the finish kernel of the objective adds one program
    programs = batch * max(side * side // 1024, 1)
    assert sum(map(math.prod, grids)) >= 7 * programs + 1
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535 for grid in grids), grids
