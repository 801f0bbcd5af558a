"""Distance targets of instance maps against other libraries, on one CPU thread, and on a GPU.

    make bench ARGS="-k test_instances --benchmark-json=instances.json"

Ours computes the signed distance and the boundary of int32 ids, and for comparison those of the same pictures as uint8
masks. edt computes only the two distances that they come from, for all instances in one call; SciPy computes the same
two, instance by instance. All distances are compared with ours before the timing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from semimoe_fast import functional as F
from semimoe_fast.data.glands import glands
from semimoe_fast.ops import _native

from .conftest import clock

pytestmark = [
    pytest.mark.benchmark(timer=clock, min_time=2e-3),  # enough calls per round to make the wait for a GPU negligible
    pytest.mark.usefixtures("one_thread"),
]


@functools.cache
def mosaic(side: int, pieces: int) -> np.ndarray:
    """int32 (side, side): pieces x pieces pictures of synthetic glands, whose ids all differ."""
    size = -(-side // pieces)
    _, ids = glands(pieces * pieces, size, seed=7, instances=True)
    ids += (ids > 0) * 100 * torch.arange(len(ids), dtype=torch.int32)[:, None, None]  # a picture has fewer glands
    rows = ids.unflatten(0, (pieces, pieces)).transpose(1, 2).reshape(pieces * size, pieces * size)
    return rows[:side, :side].contiguous().numpy()


def squared_by_edt(labels: np.ndarray) -> Callable[[], np.ndarray]:
    edt = pytest.importorskip("edt")
    return lambda: edt.edtsq(labels, parallel=1) + edt.edtsq(labels == 0, parallel=1)


def squared_by_scipy(labels: np.ndarray) -> Callable[[], np.ndarray]:
    ids = np.unique(labels[labels > 0])

    def squared() -> np.ndarray:
        distance = distance_transform_edt(labels == 0)
        for label in ids:
            distance += distance_transform_edt(labels == label)
        return distance**2

    return squared


OURS = {f"ours, {name}": name for name in _native.module().instruction_sets} | {"ours, cuda": "cuda"}
PEERS = {"edt, distances alone": squared_by_edt, "scipy, instance by instance": squared_by_scipy}
# about 10 to 400 instances
MAPS = [(256, 1), (256, 2), (1024, 1), (1024, 6)]


@pytest.mark.parametrize("provider", [*OURS, *(f"{ours}, as a mask" for ours in OURS), *PEERS])
@pytest.mark.parametrize(("side", "pieces"), MAPS)
def test_instances(benchmark, monkeypatch: pytest.MonkeyPatch, side: int, pieces: int, provider: str) -> None:
    labels = mosaic(side, pieces)
    instances = len(np.unique(labels)) - 1
    benchmark.group = f"instance maps, {side} x {side}, {instances} instances"
    benchmark.extra_info.update(instances=instances, pixels=labels.size)
    if provider in PEERS:
        squared = PEERS[provider](labels)
        np.testing.assert_array_equal(np.rint(squared()), F.squared_distance(labels, instances=True))
        slow = provider.startswith("scipy") and instances > 100
        benchmark.pedantic(squared, rounds=1) if slow else benchmark(squared)
    else:
        kernels, by_id = OURS[provider.removesuffix(", as a mask")], provider in OURS
        given = torch.from_numpy(labels if by_id else (labels != 0).astype(np.uint8))
        if kernels == "cuda":
            if reason := _native.why_unavailable("cuda"):
                pytest.skip(reason)
            given = given.cuda()
        else:
            monkeypatch.setenv("SEMIMOE_SIMD", kernels)
        benchmark(F.distance_targets, given, instances=by_id)
