"""Fixtures and settings of all tests: golden archives, tiny runs, NaN-filled memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

# On a busy machine, threads that spin at barriers block each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # several pytest processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads this on import, which comes later

from semimoe_fast import synthetic, train
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.config import TrainConfig, flag

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("SEMIMOE_SHARED", Path(__file__).parents[1] / ".." / "shared"))
RESEARCH_ONLY = {"targets_glas", "objects_glas"}  # hold GlaS content, which may not be distributed with the project


@pytest.fixture(autouse=True, scope="session")
def _settings_of_every_test() -> None:
    """Apply the settings before session and module fixtures run."""
    set_torch()


@pytest.fixture(autouse=True)
def _settings(_settings_of_every_test: None) -> None:
    """Restore the settings, which an earlier test may have changed, and the seed."""
    set_torch()
    torch.manual_seed(0)


def set_torch() -> None:
    """Fill torch.empty with NaN, so that tests see unwritten outputs; turn TF32 off on GPUs."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Function that loads a golden archive of the published implementation as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        folder = SHARED / "golden" if name in RESEARCH_ONLY else GOLDEN
        path = folder / f"{name}.npz"
        if name in RESEARCH_ONLY and not path.is_file():
            pytest.skip(
                f"{name}.npz holds GlaS data and is not distributed; set SEMIMOE_SHARED to the folder that has it"
            )
        with np.load(path) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(scope="session")
def glas_folder() -> Path:
    """GlaS at 256 x 256 in the training layout (research use only, not distributed)."""
    path = SHARED / "data" / "GlaS256"
    if not path.is_dir():
        pytest.skip("GlaS256 is not distributed; set SEMIMOE_SHARED to the folder that has data/GlaS256")
    return path


# A run of six steps, as changes of the default configuration.
TINY = {
    "synthetic": (2, 4, 2),
    "image_size": 32,
    "width": 2,
    "epochs": 3,
    "labeled_batch": 2,
    "unlabeled_batch": 2,
    "warmup_epochs": 1,
    "lr": 0.1,
    "val_every": 1,
    "device": "cpu",
    "seed": 3,
}


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Command-line options of the run TINY; skips without tyro. Prefer `tiny_config`."""
    pytest.importorskip("tyro")
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in TINY.items()}
    return [word for name, words in values.items() for word in (flag(name), *map(str, words))]


@pytest.fixture(scope="session")
def tiny_config() -> TrainConfig:
    """The configuration of the run TINY."""
    return dataclasses.replace(SYNTHETIC, **TINY)


@pytest.fixture(scope="session")
def finished(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `tiny_config`."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main(dataclasses.replace(tiny_config, out=folder))
    return folder


@pytest.fixture(scope="session")
def glands_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder in the GlaS layout: one labeled, four unlabeled and two validation images."""
    folder = tmp_path_factory.mktemp("data") / "glands"
    synthetic.write(synthetic.Folder(folder, labeled=1, unlabeled=4, val=2, size=40))
    return folder
