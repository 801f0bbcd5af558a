"""Runs with --instances: targets of touching glands, validation, evaluation, and runs from before the option."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from semimoe_fast import checkpoint, evaluate, synthetic, train
from semimoe_fast import functional as F
from semimoe_fast.data.folders import Dataset, load_part
from semimoe_fast.errors import UserError
from semimoe_fast.evaluation.scoring import count_set
from semimoe_fast.objective import StepLosses
from semimoe_fast.training import run_folder, sources
from semimoe_fast.training.batches import TrainingData
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def test_ids_that_are_not_used_are_said(tiny_config: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    synthetic.write(synthetic.Folder(tmp_path / "ids", 4, 4, 1, size=32, instances=True))
    synthetic.write(synthetic.Folder(tmp_path / "masks", 4, 4, 1, size=32))
    first = tmp_path / "ids" / "train_sup_4" / "mask" / "0000.png"
    values = len(np.unique(np.array(Image.open(first)))) - 1
    assert values > 1
    what = f"{first} has {values} values that are not 0"
    said = f"{what}, all gland; if they are ids, --instances keeps touching glands apart"
    assert notes(tiny_config, tmp_path / "ids") == said
    assert not notes(tiny_config, tmp_path / "masks")
    assert not notes(tiny_config, tmp_path / "ids", instances=True)
    pixels = np.array(Image.open(first))
    noise = np.random.default_rng(0).integers(1, 1 + values, pixels.shape).astype(np.uint16)
    Image.fromarray(np.where(pixels > 0, noise, 0)).save(first)
    gray = f"{what} and look like gray values or classes, not ids; if not all of them are gland, threshold the masks"
    for instances in (False, True):
        assert notes(tiny_config, tmp_path / "ids", instances=instances) == gray
    monkeypatch.setattr(sources, "MOST_LOOKED_AT", 32 * 32 - 1)
    assert not notes(tiny_config, tmp_path / "ids")


def test_masks_without_glands_are_said(tiny_config: TrainConfig, tmp_path: Path) -> None:
    synthetic.write(synthetic.Folder(tmp_path / "data", 4, 4, 1, size=32))
    masks = sorted((tmp_path / "data" / "train_sup_4" / "mask").iterdir())
    for path in masks:
        assert not notes(tiny_config, tmp_path / "data")
        Image.new("L", (32, 32)).save(path)
    for changes, size in (({}, " at --image-size 32"), ({"sampling": "crops"}, "")):
        said = f"all 4 masks of train_sup_4 are 0{size}, so there is no gland to learn: check the masks"
        assert notes(tiny_config, tmp_path / "data", **changes) == said


def test_masks_without_background_are_said(tiny_config: TrainConfig, tmp_path: Path) -> None:
    synthetic.write(synthetic.Folder(tmp_path / "data", 4, 4, 1, size=32))
    for path in sorted((tmp_path / "data" / "train_sup_4" / "mask").iterdir()):
        assert not notes(tiny_config, tmp_path / "data")
        Image.new("L", (32, 32), 255).save(path)
    for changes in ({}, {"sampling": "crops"}):
        said = "all 4 masks of train_sup_4 are gland everywhere, so there is no background to learn: check the masks"
        assert notes(tiny_config, tmp_path / "data", **changes) == said


def notes(tiny_config: TrainConfig, data: Path, **changes) -> str | None:
    chosen = dataclasses.replace(tiny_config, data=data, **changes)
    return sources.note_of_masks(chosen, load_data(chosen)[0].labeled)


def touching(count: int, size: int) -> Tensor:
    """Instance maps, int32 (count, size, size), of two glands that share a side and one that is apart."""
    ids = torch.zeros(count, size, size, dtype=torch.int32)
    third = size // 3
    ids[:, 2:-2, 2:third] = 7
    ids[:, 2:-2, third : 2 * third] = 70_000
    ids[:, 4:-4, 2 * third + 4 : -1] = 1
    return ids


def trainer_of(tiny_config: TrainConfig, ids: Tensor, instances: bool) -> Trainer:
    """A trainer whose labeled images have the given instance maps, or the masks of the same glands."""
    chosen = dataclasses.replace(tiny_config, instances=instances, dropout=0.0)
    data, _ = load_data(chosen)
    labeled = Dataset(data.labeled.images, ids if instances else (ids != 0).byte(), data.labeled.names)
    return Trainer(chosen, TrainingData(labeled, data.unlabeled, data.preprocessing), CPU)


@pytest.mark.parametrize("data_device", ["device", "host"])
def test_touching_glands_have_other_distances_and_the_same_mask(tiny_config: TrainConfig, data_device: str) -> None:
    ids = touching(2, 32)
    tiny = dataclasses.replace(tiny_config, data_device=data_device)

    def first_step(instances: bool) -> tuple[Tensor, tuple[Tensor, ...], StepLosses]:
        trainer = trainer_of(tiny, ids, instances)
        (batch, *_) = trainer.begin_epoch()
        _, masks = trainer._augmented(batch.labeled)
        return masks, trainer._targets(masks), trainer._losses(batch)

    labels, (mask, sdf, boundary), losses = first_step(instances=True)
    _, (binary_mask, binary_sdf, binary_boundary), binary_losses = first_step(instances=False)
    assert set(labels.unique().tolist()) == {0, 1, 7, 70_000}
    assert mask.dtype == binary_mask.dtype == torch.uint8
    assert torch.equal(mask, binary_mask)
    expected = F.distance_targets(labels, tiny.ring_radius, instances=True)
    assert torch.equal(sdf, expected[0])
    assert torch.equal(boundary, expected[1])
    seam = (mask == 1) & (boundary == 1)  # only instances have a boundary inside the foreground
    assert seam.flatten(1).any(1).all()
    assert not ((binary_mask == 1) & (binary_boundary == 1)).any()
    assert not sdf[seam].any()
    assert (sdf != binary_sdf).any()
    mask_term, *other_terms = (losses.supervised_terms != binary_losses.supervised_terms).tolist()
    assert not mask_term
    assert other_terms == [True, True]
    assert torch.equal(losses.unsupervised_terms, binary_losses.unsupervised_terms)


def test_components_of_a_mask_have_the_targets_of_the_mask(glands_folder: Path) -> None:
    """At the size of the files, where components do not touch."""
    masks, ids = (load_part(glands_folder, "val", 40, True, instances).masks for instances in (False, True))
    assert ids.max() > 1
    for ours, theirs in zip(F.distance_targets(ids, instances=True), F.distance_targets(masks), strict=True):
        assert torch.equal(ours, theirs)


def test_validation_scores_pixels_and_the_ring_of_instances(tiny_config: TrainConfig) -> None:
    trainer = trainer_of(tiny_config, touching(2, 32), instances=True)
    ids = trainer.data.labeled
    masks = Dataset(ids.images, (ids.masks != 0).byte(), ids.names)
    preprocessing = trainer.data.preprocessing
    counts = count_set(trainer.model, ids, preprocessing, CPU)
    binary = count_set(trainer.model, masks, preprocessing._replace(instances=False), CPU)
    assert [name for name in counts if not torch.equal(counts[name], binary[name])] == ["boundary expert"]
    _, ring = F.distance_targets(ids.masks, preprocessing.ring_radius, instances=True)
    assert torch.equal(counts["boundary expert"][:, 0, 2], ring.sum((1, 2)))


def test_run_on_a_folder_of_instance_maps(tiny_config: TrainConfig, tmp_path: Path) -> None:
    """Another run than with masks; a second run reads the cache; `evaluate` gives the trainer's score of the ring."""
    pytest.importorskip("tyro")
    data, runs = tmp_path / "glands", tmp_path / "runs"
    synthetic.write(synthetic.Folder(data, labeled=2, unlabeled=4, val=2, size=64, seed=5, instances=True))
    small = dataclasses.replace(tiny_config, data=data, epochs=1, warmup_epochs=0)
    for name, instances in (("instances", True), ("again", True), ("masks", False)):
        train.main(dataclasses.replace(small, instances=instances, out=runs / name))
    weights = {name: checkpoint.read(runs / name / run_folder.LAST)[1] for name in ("instances", "again", "masks")}
    key = "model.gating.heads.0.weight"
    assert torch.equal(weights["again"][key], weights["instances"][key])
    assert not torch.equal(weights["masks"][key], weights["instances"][key])
    assert len(list((runs / "cache").iterdir())) == 5  # two parts with either kind of mask, one without
    arguments = ["--checkpoint", str(runs / "instances" / run_folder.LAST), "--data", str(data), "--device", "cpu"]
    evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")])
    record = json.loads((runs / "instances" / run_folder.METRICS_FILE).read_text())
    scores = json.loads((tmp_path / "scores.json").read_text())["predictors"]
    assert scores["boundary expert"] == record["val"]["boundary expert"]  # which is compared at the training size


def test_resume_cannot_change_the_option(finished: Path) -> None:
    pytest.importorskip("tyro")
    with pytest.raises(UserError, match=r"--instances is True, but the run in .* was started with False"):
        train.main(["--resume", str(finished), "--instances"])
