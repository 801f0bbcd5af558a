"""The command that describes an installation."""

from __future__ import annotations

import json
import sys

import numpy as np
import PIL
import pytest
import torch

from semimoe_fast import info, ops


def test_info_as_json_holds_what_the_table_prints(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    printed = {}
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["info", *arguments])
        info.main()
        printed[bool(arguments)] = capsys.readouterr().out
    values = json.loads(printed[True])
    assert values["torch"] == torch.__version__
    assert (values["numpy"], values["pillow"]) == (np.__version__, PIL.__version__)
    for name, value in values.items():
        assert isinstance(value, dict) or value in printed[False], name
    assert {name.split(", ")[0] for name in values["backends"]} == set(ops.OPERATIONS)
