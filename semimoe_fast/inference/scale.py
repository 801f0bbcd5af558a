"""The options --scale and --mpp of the commands that predict."""

from __future__ import annotations

import math

from ..errors import UserError


def check_scale(scale: float | None, mpp: float | None) -> None:
    """Raise UserError for values of --scale and --mpp that cannot be used."""
    for name, value in (("--scale", scale), ("--mpp", mpp)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: give a positive number")
    if scale is not None and mpp is not None:
        raise UserError("--scale and --mpp: both given; give one of them")
