"""Calls that must refuse what they are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from semimoe_fast.errors import UserError


def refused(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line
