"""Fixtures of every test: golden archives, runs of a few steps; poisoned memory, a patient start of processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# On a busy machine, threads that spin at barriers starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which so far nothing has done

from semimoe_fast import synthetic, train
from semimoe_fast.training.config import SYNTHETIC, TrainConfig

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("SEMIMOE_SHARED", Path(__file__).parents[1] / ".." / "shared"))
RESEARCH_ONLY = {"targets_glas", "objects_glas"}  # hold GlaS content, which may not be distributed with the project


@pytest.fixture(autouse=True, scope="session")
def _settings_of_every_test() -> None:
    """For what is computed in fixtures that serve several tests."""
    set_torch()


@pytest.fixture(autouse=True)
def _settings(_settings_of_every_test: None) -> None:
    """Whatever an earlier test has left, and the same random numbers every time."""
    set_torch()
    torch.manual_seed(0)


def set_torch() -> None:
    """torch.empty is filled with NaN, so that unwritten outputs show; float32 on a GPU is float32, not TF32."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


class PatientPopen(subprocess.Popen):
    """Tries for a minute to start a process: on a busy machine fork fails with EAGAIN, in Python BlockingIOError.

    It does so while all processes of the machine or container together are as many as it allows, and some soon end.
    """

    def __init__(self, *args: object, **options: object) -> None:
        for pause in (1, 2, 4, 8, 16, 32):
            try:
                super().__init__(*args, **options)
                return
            except BlockingIOError:
                time.sleep(pause)
        super().__init__(*args, **options)


subprocess.Popen = PatientPopen  # subprocess.run uses it too


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Load a golden archive, written by the published implementation, as a dict of arrays."""

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


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of a training run of six steps; skips where the parser of command lines is missing."""
    pytest.importorskip("tyro")
    sizes = "--synthetic 2 4 2 --image-size 32 --width 2 --epochs 3 --labeled-batch 2 --unlabeled-batch 2"
    return f"{sizes} --warmup-epochs 1 --lr 0.1 --val-every 1 --device cpu --seed 3".split()


@pytest.fixture(scope="session")
def tiny_config() -> TrainConfig:
    """The same run as a configuration."""
    return dataclasses.replace(
        SYNTHETIC,
        synthetic=(2, 4, 2),
        image_size=32,
        width=2,
        epochs=3,
        labeled_batch=2,
        unlabeled_batch=2,
        warmup_epochs=1,
        lr=0.1,
        val_every=1,
        device="cpu",
        seed=3,
    )


@pytest.fixture(scope="session")
def finished(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main(dataclasses.replace(tiny_config, out=folder))
    return folder


@pytest.fixture(scope="session")
def glands_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GlaS layout: one labeled image, four unlabeled, two for validation."""
    folder = tmp_path_factory.mktemp("data") / "glands"
    synthetic.write(synthetic.Folder(folder, labeled=1, unlabeled=4, val=2, size=40))
    return folder
