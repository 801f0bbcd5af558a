"""The methods by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from semimoe_fast.model import STRIDE
from semimoe_fast.training.speed import flops_per_step

from .cps import CPS
from .mean_teacher import MeanTeacher
from .method import Method
from .semi_moe import PublishedSemiMoE
from .supervised import Supervised
from .unimatch import UniMatch


def same_flops_width(width: int) -> int:
    """The width of one U-Net whose floating-point operations are next to those of the three experts of a width.

    Convolutions take nearly all of them, and theirs grow with the square of the width.
    """
    side = 4 * STRIDE  # the ratio of two widths does not depend on it
    experts, about = flops_per_step(width, side, 1), round(math.sqrt(3) * width)
    return min(range(about - 1, about + 2), key=lambda wide: abs(flops_per_step(wide, side, 1) / 3 - experts))


def wide(method: Callable[[int], Method]) -> Callable[[int], Method]:
    """The method with U-Nets that each have the floating-point operations of Semi-MoE's three experts together.

    So a prediction costs the same, but not a training step: docs/accuracy.md has their ratios.
    """
    return lambda width: method(same_flops_width(width))


def supervised(width: int) -> Method:
    return Supervised(width, "labeled")


METHODS: dict[str, Callable[[int], Method]] = {  # each takes the width of Semi-MoE's experts
    "supervised": supervised,
    "supervised-all": lambda width: Supervised(width, "labels of all"),
    "mean-teacher": MeanTeacher,
    "cps": CPS,
    "unimatch": UniMatch,
    "semi-moe": PublishedSemiMoE,
    "semi-moe-no-sdf": lambda width: PublishedSemiMoE(width, tasks=("mask", "boundary")),
    "semi-moe-no-boundary": lambda width: PublishedSemiMoE(width, tasks=("mask", "sdf")),
    "semi-moe-equal-gates": lambda width: PublishedSemiMoE(width, equal_gates=True),
    "semi-moe-fixed-weights": lambda width: PublishedSemiMoE(width, fixed_weights=True),
    "supervised-wide": wide(supervised),
    "mean-teacher-wide": wide(MeanTeacher),
    "cps-wide": wide(CPS),
    "unimatch-wide": wide(UniMatch),
}
