"""The scripts in examples/ run and learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree around the tests")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fall(losses: list[float]) -> float:
    """By how much the mean loss falls from the first to the last quarter of the steps."""
    assert np.isfinite(losses).all()
    quarter = len(losses) // 4
    return np.mean(losses[:quarter]) - np.mean(losses[-quarter:])


def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("plain_pytorch").main(epochs=2, size=32, width=4)
    assert len(losses) == 16
    assert fall(losses) > 0
    assert capsys.readouterr().out.count("validation Dice 0.") == 2


def test_monai_training(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("monai", reason="needs MONAI: pip install 'semimoe_fast[monai]'")
    losses = example("monai_training").main()  # as a reader runs it: one epoch
    assert len(losses) == 8
    assert fall(losses) > 0
    assert capsys.readouterr().out.count("validation Dice 0.") == 1
