"""A folder of tiny synthetic glands, with masks of the unlabeled images, for the methods of benchmarks/peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from semimoe_fast import synthetic
from semimoe_fast.data.cache import Cache
from semimoe_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from benchmarks.peers.training import Splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic glands, with masks of the unlabeled images."""
    out = tmp_path_factory.mktemp("data") / "glands"
    synthetic.write(synthetic.Folder(out, labeled=3, unlabeled=4, val=2, size=64))
    masks = out / "train_unsup_4" / "mask"
    masks.mkdir()
    for path in (masks.parent / "image").iterdir():
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(masks / path.name)
    return out


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return TrainConfig(
        data=folder, image_size=32, width=4, epochs=2, warmup_epochs=0, lr=0.1, seed=3, device="cpu", threads=1
    )


@pytest.fixture(scope="module")
def splits(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    from benchmarks.peers.training import load_splits  # only the source tree has it

    return load_splits(config, Cache(tmp_path_factory.mktemp("cache")), all_labels=True)
