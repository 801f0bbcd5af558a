"""The options --scale and --mpp of the commands that predict."""

from __future__ import annotations

from ..data.readers import SCALES
from ..data.regions import PLAUSIBLE_MPP
from ..errors import UserError


def check_scale(scale: float | None, mpp: float | None) -> None:
    """Raise UserError for values of --scale and --mpp that cannot be used."""
    for name, value, (least, most) in (("--scale", scale, SCALES), ("--mpp", mpp, PLAUSIBLE_MPP)):
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value}: give a number from {least:g} to {most:g}")
    if scale is not None and mpp is not None:
        raise UserError("--scale and --mpp: both given; give one of them")
