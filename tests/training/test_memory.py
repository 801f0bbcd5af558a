"""Memory that the forward pass keeps for the backward pass; with the weights, it is the memory of a step."""

from __future__ import annotations

import pytest

from semimoe_fast.device import Precision

memory = pytest.importorskip("benchmarks.memory", reason="needs the source tree, and tests run from its root")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_linear_in_the_batch(precision: Precision) -> None:
    two, four, eight = (memory.kept_by_ours(batch, precision) for batch in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)


@pytest.mark.parametrize(
    ("precision", "recompute", "most"),
    [("bf16", False, 0.42), ("fp32", False, 0.78), ("bf16", True, 0.26), ("fp32", True, 0.45)],
)
def test_memory_per_image_is_below_the_published_trainer(
    precision: Precision, recompute: bool, most: float, published: int
) -> None:
    """The difference of two batch sizes leaves out saved weights, which do not depend on the batch."""
    eight, four = (memory.kept_by_ours(batch, precision, recompute) for batch in (8, 4))
    assert eight - four <= most * published


@pytest.fixture(scope="module")
def published() -> int:
    return memory.kept_by_baseline(8) - memory.kept_by_baseline(4)
