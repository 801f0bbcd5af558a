"""Memory that the forward pass keeps for the backward pass; with the weights, it is the memory of a step."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from semimoe_fast.device import Precision
from semimoe_fast.errors import UserError
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.memory import KEPT, require_memory, total_bytes

memory = pytest.importorskip("benchmarks.memory", reason="needs the source tree, and tests run from its root")
kept_by_ours = functools.cache(memory.kept_by_ours)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_linear_in_the_batch(precision: Precision) -> None:
    two, four, eight = (kept_by_ours(batch, precision, False) for batch in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)


@pytest.mark.parametrize(
    ("precision", "recompute", "most"),
    [("bf16", False, 0.42), ("fp32", False, 0.78), ("bf16", True, 0.26), ("fp32", True, 0.45)],
)
def test_memory_per_image_is_below_the_published_trainer(
    precision: Precision, recompute: bool, most: float, published: int
) -> None:
    """The difference of two batch sizes leaves out saved weights, which do not depend on the batch."""
    eight, four = (kept_by_ours(batch, precision, recompute) for batch in (8, 4))
    assert eight - four <= most * published


@pytest.fixture(scope="module")
def published() -> int:
    return memory.kept_by_baseline(8) - memory.kept_by_baseline(4)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "options",
    [{"image_size": 16384}, {"width": 4096}, {"labeled_batch": 10**6}, {"labeled_batch": 2 * 10**6, "accumulate": 2}],
    ids=str,
)
def test_run_that_cannot_fit_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=r"images at once need at least [\d,]+ GiB, and this machine has [\d,]+; make one"
    ):
        require_memory(dataclasses.replace(SYNTHETIC, **options), CPU, 1)
    require_memory(SYNTHETIC, CPU, 1)


def test_limit_of_a_container_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("semimoe_fast.training.memory.CONTAINER_LIMIT", tmp_path / "memory.max")
    machine = total_bytes(CPU)
    for text, expected in (("max\n", machine), ("1048576\n", 2**20)):
        (tmp_path / "memory.max").write_text(text)
        assert total_bytes(CPU) == expected


@pytest.mark.parametrize("name", KEPT)
def test_bound_is_just_below_the_counted_memory(name: str) -> None:
    precision, _, recompute = name.partition(" ")
    eight, four = (kept_by_ours(batch, precision, bool(recompute)) for batch in (8, 4))
    counted = (eight - four) / (2 * 4) / (16 * memory.SIZE**2)
    assert 0.9 * counted < KEPT[name] <= counted
