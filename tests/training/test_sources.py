"""The parts of a data folder: what a run says of folders that are named or laid out in another way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from semimoe_fast.data.folders import load_part
from semimoe_fast.data.layout import LAYOUT
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data, note_of_masks, parts_of, with_parts

COMPLETE = ("train_sup_3/image", "train_sup_3/mask", "train_unsup_9/image", "val/image", "val/mask")


def refused_layout(config: TrainConfig, root: Path, *folders: str, **changes: object) -> str:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return refused(parts_of, dataclasses.replace(config, data=root, **changes))


def test_parts_are_found_by_their_names(tiny_config: TrainConfig, tmp_path: Path) -> None:
    for folder in COMPLETE:
        (tmp_path / folder).mkdir(parents=True)
    assert parts_of(dataclasses.replace(tiny_config, data=tmp_path)) == ("train_sup_3", "train_unsup_9", "val")


def test_a_run_keeps_the_names_of_its_parts(tiny_config: TrainConfig, tmp_path: Path) -> None:
    """A part that is added later would make the choice ambiguous when the run is resumed."""
    for folder in COMPLETE:
        (tmp_path / folder).mkdir(parents=True)
    config = with_parts(dataclasses.replace(tiny_config, data=tmp_path))
    baseline = with_parts(dataclasses.replace(tiny_config, data=tmp_path, unlabeled="none"))
    (tmp_path / "train_sup_4" / "image").mkdir(parents=True)
    assert parts_of(config) == ("train_sup_3", "train_unsup_9", "val")
    assert parts_of(baseline) == ("train_sup_3", None, "val")
    assert not baseline.semi_supervised
    assert with_parts(tiny_config) == tiny_config  # without --data


def test_synthetic_glands_without_unlabeled_ones_make_a_supervised_run(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, synthetic=(4, 0, 2), labeled_batch=2, unlabeled_batch=6, scale_lr=True)
    baseline = dataclasses.replace(config, unlabeled="none")
    assert (config.images_per_step, config.base_lr) == (baseline.images_per_step, baseline.base_lr) == (2, config.lr)
    assert load_data(config)[0].unlabeled is None


@pytest.mark.parametrize(
    ("folders", "remedy"),
    [
        (
            ("train_sup_3/images", "train_sup_3/masks"),
            "/train_sup_3/image is missing: ROOT/train_sup_3 has images, masks; ",
        ),
        (("train_sup_3",), "/train_sup_3/image is missing: ROOT/train_sup_3 has nothing; add or rename a folder"),
        (
            ("train_sup_3/image", "train_unsup_9/images"),
            "/train_unsup_9/image is missing: ROOT/train_unsup_9 has images; ",
        ),
        (("patient_1",), f"/train_sup_N/image is missing: ROOT has no part; it needs {LAYOUT}"),
        (("train/Images",), "/train_sup_N/image is missing: ROOT has no part; lay it out with `python -m semimoe_fast"),
        (("CRAG/train/Images",), "/train_sup_N/image is missing: ROOT has no part; lay it out with `python -m semimoe"),
        (("image", "mask"), "/train_sup_N/image is missing: ROOT is a part itself; give the folder above it"),
        (
            ("a/image", "b/image", "train_sup_1/image", "train_sup_2/image", "train_unsup_3/image"),
            ": 2 parts are named train_sup_*; choose one with --labeled NAME (parts of this folder: train_sup_1, tr",
        ),
        (("a/image", "b/image"), ": 0 parts are named train_sup_*; choose one with --labeled NAME (parts of this "),
        (
            ("train_sup_3/image",),
            ": 0 parts are named train_unsup_*; choose one with --unlabeled NAME, or --unlabeled none ",
        ),
    ],
)
def test_other_layouts_are_refused(
    tiny_config: TrainConfig, tmp_path: Path, folders: tuple[str, ...], remedy: str
) -> None:
    message = refused_layout(tiny_config, tmp_path, *folders)
    assert message.startswith(f"{tmp_path}{remedy.replace('ROOT', str(tmp_path))}")


def test_unpacked_glas_is_to_be_laid_out(tiny_config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "train_1_anno.bmp").touch()
    assert refused_layout(tiny_config, tmp_path).endswith("lay it out with `python -m semimoe_fast.prepare`")


def test_a_run_has_images_to_validate_on(tiny_config: TrainConfig, tmp_path: Path) -> None:
    message = refused_layout(tiny_config, tmp_path, *COMPLETE, val="none")
    assert message == "--val is none, but a run needs images to validate on: give the name of a part"


def test_two_values_are_said(tiny_config, tmp_path):
    for kind, shape in (("image", (32, 32, 3)), ("mask", (32, 32))):
        (tmp_path / "train_sup_1" / kind).mkdir(parents=True)
        pixels = np.zeros(shape, np.uint8)
        pixels[4:10, 4:10], pixels[20:30, 20:30] = 1, 2
        Image.fromarray(pixels).save(tmp_path / "train_sup_1" / kind / "a.png")
    config = dataclasses.replace(tiny_config, data=tmp_path)
    assert "has 2 values that are not 0" in (note_of_masks(config, load_part(tmp_path, "train_sup_1", 32, True)) or "")


def test_stored_squares_hold_the_largest_magnification(tiny_config):
    config = dataclasses.replace(tiny_config, image_size=32, scale_jitter=1.3)  # 41.6 pixels
    data, val = load_data(config)
    assert data.labeled.images.shape[-1] == data.unlabeled.images.shape[-1] == 42
    assert val.images.shape[-1] == 32
