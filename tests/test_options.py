"""Command lines from dataclasses, and all that works where their parser is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from semimoe_fast import train
from semimoe_fast.errors import UserError
from semimoe_fast.training import config
from semimoe_fast.training.config import TrainConfig

ROOT = Path(__file__).parents[1]

# Every module of the package and, in the source tree, the scripts of the benchmarks.
IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path
sys.modules["tyro"] = None
import semimoe_fast
names = [module.name for module in pkgutil.walk_packages(semimoe_fast.__path__, "semimoe_fast.")]
names += [f"benchmarks.{path.stem}" for path in Path("benchmarks").glob("*.py")]
for name in names:
    if not name.startswith("semimoe_fast.kernels"):
        importlib.import_module(name)
assert "semimoe_fast.training.trainer" in names
"""


def test_everything_can_be_imported_without_the_parser() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_without_the_parser_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(UserError, match="tyro, which reads the options of commands, is not installed: run `pip"):
        config.parse([])


def test_options_are_the_configuration(tiny: list[str], tiny_config: TrainConfig) -> None:
    assert config.parse(tiny) == tiny_config


def test_a_configuration_is_checked() -> None:
    with pytest.raises(UserError, match="--width is 0"):
        train.main(TrainConfig(width=0))


def test_help_shows_what_a_value_is(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    for _ in range(2):  # as often as one likes
        with pytest.raises(SystemExit):
            config.parse(["--help"])
        text = capsys.readouterr().out
        assert "--data DIR" in text
        assert "--ema DECAY" in text
