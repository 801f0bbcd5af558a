"""Small models and images, and calls of `python -m semimoe_fast.predict` on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from semimoe_fast import checkpoint, predict
from semimoe_fast.inference import open_for, predict_image
from semimoe_fast.model import SemiMoE


def save_model(path: Path, tasks: tuple[str, ...] = ("mask", "sdf", "boundary"), **changes: object) -> Path:
    """A checkpoint with random weights, for crops; changes: of its preprocessing."""
    torch.manual_seed(1)
    values = {"sampling": "crops", "antialias": True} | changes
    preprocessing = checkpoint.Preprocessing(32, (0.5,) * 3, (0.2,) * 3, **values)._asdict()
    checkpoint.save(path, SemiMoE(width=2, expert_tasks=tasks), {"preprocessing": preprocessing})
    return path


def save_image(path: Path, height: int, width: int, **options: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), **options)
    return path


def fields_of(model: Path, image: Path | np.ndarray, *scale: float | None) -> list[torch.Tensor]:
    """probability, sdf and boundary of an image as the library gives them."""
    loaded, metadata, _ = checkpoint.load(model)
    preprocessing = checkpoint.Preprocessing.of(model, metadata)
    with open_for(image, preprocessing, *scale) as reader:
        fields = ("probability", "sdf", "boundary")
        pieces = [piece for _, piece in predict_image(loaded, reader, preprocessing, fields=fields, tile=64)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def call(model: Path, images: Path, out: Path, *more: str, tiles: bool = True, overwrite: bool = True) -> Path:
    """Predict in tiles of 64, and replace the files of earlier calls."""
    words = ["--checkpoint", model, "--input", images, "--out", out, "--device", "cpu"]
    words += ["--tile-size", "64"] * tiles + ["--overwrite"] * overwrite
    predict.main([str(word) for word in [*words, *more]])
    return out


def failing(capsys: pytest.CaptureFixture, *arguments: object, overwrite: bool = True) -> str:
    """Call predict on a folder with files that cannot be read: what it says on stderr."""
    with pytest.raises(SystemExit) as caught:
        call(*arguments, overwrite=overwrite)
    assert caught.value.code == 1
    return capsys.readouterr().err
