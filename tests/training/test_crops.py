"""Runs with --sampling crops, --scale-jitter, --antialias and changes of appearance."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from refusals import refused
from runs import finish, records
from stopping import StopAfter

from semimoe_fast import checkpoint, synthetic, train
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data import augment
from semimoe_fast.data.appearance import apply
from semimoe_fast.data.folders import Dataset, list_pairs, load_part
from semimoe_fast.data.ragged import Ragged, starts_of
from semimoe_fast.data.readers import ArrayReader
from semimoe_fast.errors import UserError
from semimoe_fast.evaluation import metrics
from semimoe_fast.evaluation.files import evaluate_model
from semimoe_fast.evaluation.scoring import count_set
from semimoe_fast.evaluation.whole import predict_whole
from semimoe_fast.inference.predictor import gated_foreground
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import config, report, run_folder
from semimoe_fast.training.batches import Batches, TrainingData, tensors_of
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.distributed import World
from semimoe_fast.training.sources import Parts, load_data, stored_size
from semimoe_fast.training.trainer import Trainer

CPU = torch.device("cpu")
CHANGES = {"stain": 0.2, "brightness": 0.2, "blur": 1.0, "noise": 0.05}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder with images of 24 to 90 pixels a side, most of them larger than crops of 32."""
    folder = tmp_path_factory.mktemp("data") / "mixed"
    synthetic.write(synthetic.Folder(folder, labeled=3, unlabeled=4, val=3, size=48, sizes=(24, 90), instances=True))
    return folder


@pytest.fixture(scope="module")
def crops(tiny_config: TrainConfig, mixed: Path) -> TrainConfig:
    return dataclasses.replace(tiny_config, data=mixed, sampling="crops", steps_per_epoch=2, instances=True, **CHANGES)


@pytest.fixture(scope="module")
def data(crops: TrainConfig) -> TrainingData:
    return load_data(crops)[0]


@pytest.mark.parametrize(("sampling", "jitter"), [("crops", None), ("resize", None), ("resize", 1.3), ("crops", 2.0)])
def test_processes_share_the_batches_of_one(
    crops: TrainConfig, data: TrainingData, sampling: str, jitter: float | None
) -> None:
    chosen = dataclasses.replace(crops, sampling=sampling, scale_jitter=jitter)
    images = data if sampling == "crops" else load_data(chosen)[0]
    whole, *parts = (
        [list(tensors_of(batch)) for batch in Batches(chosen, images, CPU, world).of_epoch(1)]
        for world in (World(), World(0, 2), World(1, 2))
    )
    assert len(whole) == 2
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(batch) == 2 * 11 + 1  # images, four of geometry, six of appearance, of both batches; and masks
        for tensor, *shares in zip(batch, first, second, strict=True):
            assert torch.equal(torch.cat(shares), tensor)


def test_crops_in_host_memory_are_the_same(crops: TrainConfig, data: TrainingData) -> None:
    resident, streamed = (
        Batches(dataclasses.replace(crops, data_device=where), data, CPU, World()) for where in ("device", "host")
    )
    for ours, theirs in zip(resident.of_epoch(2), streamed.of_epoch(2, 0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True))


def test_an_epoch_is_the_area_of_the_unlabeled_images(crops: TrainConfig, data: TrainingData) -> None:
    areas = data.unlabeled.sizes.prod(1) / 32**2
    batches = Batches(dataclasses.replace(crops, steps_per_epoch=None), data, CPU, World())
    assert batches.steps_per_epoch == round(areas.clamp(min=1).sum().item()) // 2 > 2


def test_a_step_sees_the_crops_with_the_changes_of_appearance(crops: TrainConfig, data: TrainingData) -> None:
    trainer = Trainer(crops, data, CPU)
    (batch, _) = trainer.begin_epoch()
    labeled = batch.labeled
    images, masks = trainer._augmented(labeled)
    assert images.shape == (2, 3, 32, 32)
    assert masks.shape == (2, 32, 32)
    assert masks.max() > 1  # ids
    sampled, expected_masks = augment.resample(labeled.images, labeled.masks, labeled.augmentation, 32, True)
    expected = augment.normalize(apply(sampled, labeled.appearance), trainer.mean, trainer.std)
    assert torch.equal(images, expected)
    assert torch.equal(masks, expected_masks)
    plain, _ = trainer._augmented(labeled._replace(appearance=None))
    assert (plain - images).abs().amax((1, 2, 3)).min() > 0.1


def test_scale_jitter_magnifies_whole_images_with_their_masks(tiny_config: TrainConfig) -> None:
    """Stripes as wide as 8 pixels, in the image as in the mask: both have the same edges, to the pixel."""
    stripes = (torch.arange(32) // 8 % 2).to(torch.uint8).expand(4, 32, 32)
    images = Dataset(255 * stripes[:, None].expand(4, 3, 32, 32), stripes, list("abcd"))
    data = TrainingData(images, images, Preprocessing(32, (0.0,) * 3, (1.0,) * 3))
    trainer = Trainer(dataclasses.replace(tiny_config, scale_jitter=1.5, steps_per_epoch=20), data, CPU)
    extents = []
    for batch in trainer.begin_epoch():
        pixels, masks = trainer._augmented(batch.labeled)
        extents += batch.labeled.augmentation.extent.tolist()
        inside = (pixels - 0.5).abs() > 1e-3  # a pixel of one half is as near to either
        assert torch.equal((pixels > 0.5)[inside], masks[:, None].expand_as(pixels)[inside] != 0)
    assert 21 <= min(extents) < 26
    assert 40 < max(extents) <= 48


@pytest.mark.parametrize(("side", "stored"), [(24, 32), (40, 40), (48, 48), (60, 48)])
def test_squares_are_magnified_from_pixels_of_the_files(
    side: int, stored: int, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    """Files are not enlarged for it; those as large as the largest magnification are stored as they are."""
    synthetic.write(synthetic.Folder(tmp_path / "data", labeled=3, unlabeled=2, val=1, size=side))
    config = dataclasses.replace(
        tiny_config, data=tmp_path / "data", image_size=32, scale_jitter=1.5, steps_per_epoch=20
    )
    data, val = load_data(config)
    assert data.labeled.images.shape[-1] == data.unlabeled.images.shape[-1] == stored
    assert val.images.shape[-1] == 32
    if side == 48:
        files = load_part(config.data, "train_sup_3", side, True)
        assert torch.equal(data.labeled.images, files.images)
        assert torch.equal(data.labeled.masks, files.masks)
    trainer = Trainer(config, data, CPU)
    extents = []
    for batch in trainer.begin_epoch():
        pixels, masks = trainer._augmented(batch.labeled)
        assert pixels.shape[2:] == masks.shape[1:] == (32, 32)
        extents += batch.labeled.augmentation.extent.tolist()
    assert stored / 1.5 - 0.5 <= min(extents) < stored / 1.25
    assert stored * 1.25 < max(extents) <= stored * 1.5 + 0.5


def test_crops_do_not_ask_for_the_sizes_of_the_files(crops: TrainConfig) -> None:
    """Whole slides have no header that a resized square needs."""
    config = dataclasses.replace(crops, data=Path("missing"), scale_jitter=2.0)
    assert stored_size(config, Parts("labeled", None, "val")) == config.image_size


def test_changes_of_appearance_leave_the_geometry(tiny_config: TrainConfig) -> None:
    images, _ = load_data(tiny_config)
    plain, changed = (
        next(Batches(dataclasses.replace(tiny_config, **changes), images, CPU, World()).of_epoch(0))
        for changes in ({}, CHANGES)
    )
    assert plain.labeled.appearance is None
    for ours, theirs in zip(tensors_of(plain.labeled), tensors_of(changed.labeled), strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "crops"},
        {"sampling": "resize", **RECIPES["strong"]},
    ],
    ids=lambda changes: changes["sampling"],
)
def test_run_resumes_bitwise_and_stores_its_preprocessing(
    crops: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The resumed run reads the cache of the uninterrupted one."""
    one, two = tmp_path / "one", tmp_path / "two"
    sampling, chosen = changes["sampling"], dataclasses.replace(crops, **{"ema": 0.9} | changes)
    train.main(dataclasses.replace(chosen, out=one))
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", lambda _: StopAfter(3))
        with pytest.raises(SystemExit):
            train.main(dataclasses.replace(chosen, out=two))
    train.main(dataclasses.replace(config.read_config(two), resume=two))
    (metadata, tensors), (expected_metadata, expected) = (checkpoint.read(f / run_folder.LAST) for f in (two, one))
    assert metadata == expected_metadata
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert records(two) == records(one)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    preprocessing = Preprocessing.of(two, metadata)
    assert (preprocessing.sampling, preprocessing.antialias, preprocessing.mpp) == (sampling, False, None)
    assert (preprocessing.scale == 1) == (sampling == "crops")  # crops are not shrunk


@torch.no_grad()
def test_validation_scores_whole_images(crops: TrainConfig, data: TrainingData) -> None:
    val = load_data(crops)[1]
    model, preprocessing = Trainer(crops, data, CPU).model.eval(), data.preprocessing
    counts = count_set(model, val, preprocessing, CPU)
    for index in range(3):
        found = predict_whole(model, ArrayReader(val.image(index).numpy()), preprocessing, CPU)
        expected = metrics.count(found["gated"][None], val.mask(index)[None])
        assert torch.equal(counts["gated"][index], expected[0])
        assert found["gated"].shape == tuple(val.sizes[index].tolist())
        pixels = val.image(index).permute(2, 0, 1)[None]  # they fit into one tile
        output = model(augment.normalize(pixels, preprocessing.mean, preprocessing.std))
        assert torch.equal(found["gated"][None], gated_foreground(output))
    nothing = count_set(model, val[:0], preprocessing, CPU)
    assert {name: count.shape for name, count in nothing.items()} == dict.fromkeys(counts, (0, 45, 3))


def test_evaluation_of_the_files_gives_the_counts_of_validation(crops: TrainConfig, data: TrainingData) -> None:
    val = load_data(crops)[1]
    model, preprocessing = Trainer(crops, data, CPU).model, data.preprocessing
    found = evaluate_model(model, list_pairs(crops.data, "val", with_masks=True), preprocessing, CPU)
    expected = count_set(model, val, preprocessing, CPU)
    assert found.counts.keys() == expected.keys()
    assert all(torch.equal(found.counts[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_train_and_validate_as_one(crops: TrainConfig, mixed: Path, tmp_path: Path) -> None:
    """Without dropout, which differs by rank, and with synchronized BN."""
    one, two = tmp_path / "one", tmp_path / "two"
    config = dataclasses.replace(crops, epochs=2, lr=0.01, dropout=0.0, sync_bn=True, instances=False)
    train.main(dataclasses.replace(config, out=one))
    finish(config, two, processes=2)
    for ours, theirs in zip(records(two), records(one), strict=True):
        # other order of fp32 sums, over 23 layers of two channels, as in test_distributed.py
        assert ours["total"] == pytest.approx(theirs["total"], rel=1e-3)
        assert ours["val"]["gated"]["dice"] == pytest.approx(theirs["val"]["gated"]["dice"], abs=2e-3)


# ----------------------------------------------------------------------------------------------------------- resizing


def test_scale_is_the_median_of_both_sides(tiny_config: TrainConfig, mixed: Path) -> None:
    resized, _ = load_data(dataclasses.replace(tiny_config, data=mixed))
    whole, _ = load_data(dataclasses.replace(tiny_config, data=mixed, sampling="crops"))
    expected = (32 / whole.labeled.sizes.double()).flatten().sort().values[2:4].mean()  # of six sides
    assert resized.preprocessing.scale == pytest.approx(expected.item(), rel=1e-12)
    assert resized.preprocessing.antialias is False
    assert load_data(tiny_config)[0].preprocessing.scale is None


def test_resolution_of_the_files_is_stored(tiny_config: TrainConfig, mixed: Path, tmp_path: Path) -> None:
    """Half a micron a pixel in the files; 72 dots per inch are no microscope's."""
    folder = shutil.copytree(mixed, tmp_path / "data")
    chosen = [dataclasses.replace(tiny_config, data=folder, sampling=sampling) for sampling in ("crops", "resize")]
    for dpi, mpp in ((50_800, 0.5), (72, None)):
        for path in (folder / "train_sup_3" / "image").iterdir():
            with Image.open(path) as image:
                image.save(path, dpi=(dpi, dpi))
        crops, resized = (load_data(each)[0].preprocessing for each in chosen)
        if mpp is None:
            assert crops.mpp is resized.mpp is None
        else:
            assert crops.mpp == pytest.approx(mpp, rel=1e-4)
            assert resized.mpp == pytest.approx(mpp / resized.scale, rel=1e-4)


def test_antialiasing_is_in_the_images_and_in_the_checkpoint(tiny_config: TrainConfig, mixed: Path) -> None:
    plain, smooth = (
        load_data(dataclasses.replace(tiny_config, data=mixed, antialias=antialias)) for antialias in (False, True)
    )
    assert smooth[0].preprocessing.antialias
    for ours, theirs in ((plain[0].labeled, smooth[0].labeled), (plain[0].unlabeled, smooth[0].unlabeled)):
        assert not torch.equal(ours.images, theirs.images)
    assert plain[1].fingerprint != smooth[1].fingerprint  # a resumed run refuses images of the other kind


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stain": -0.1}, "--stain is -0.1: give a number from 0 to 1"),
        ({"brightness": 1.5}, "--brightness is 1.5: give a number from 0 to 1"),
        ({"blur": 6.0}, "--blur is 6.0: give a number from 0 to 5"),
        ({"noise": 2.0}, "--noise is 2.0: give a number from 0 to 1"),
        ({"mpp": 0.5, "sampling": "resize"}, "--mpp is 0.5, but --sampling resize scales images by their sides"),
        ({"mpp": 0.0}, "--mpp is 0.0: give microns per pixel from 0.02 to 20"),
        ({"sampling": "crops", "data": None}, "--sampling crops needs --data"),
        ({"scale_jitter": 0.9}, "--scale-jitter is 0.9: give a factor from 1 to 2, or None for the published crops"),
        ({"scale_jitter": 2.1}, "--scale-jitter is 2.1: give a factor from 1 to 2"),
        ({"sampling": "crops", "antialias": True}, "--antialias is for --sampling resize: leave it out"),
    ],
)
def test_options_that_cannot_be_used_are_refused(crops: TrainConfig, changes: dict, message: str) -> None:
    assert refused(dataclasses.replace(crops, **changes).check).startswith(message)


def test_overlays_cut_only_the_images_that_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To cut the middle of all images would take more memory than the run."""
    windows, cut = Ragged.windows, []
    monkeypatch.setattr(
        Ragged, "windows", lambda self, rows, *rest: cut.append(rows.tolist()) or windows(self, rows, *rest)
    )
    sizes = torch.tensor([[20, 50]]).expand(21, 2)
    pixels, masks = torch.zeros(21_000, 3, dtype=torch.uint8), torch.zeros(21_000, dtype=torch.uint8)
    val = Ragged(pixels, masks, starts_of(sizes), sizes, ["a"] * 21)
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.2,) * 3)
    report.draw_overlays(SemiMoE(width=2), val, preprocessing, CPU, tmp_path / "overlays.png")
    assert cut == [[0, 4, 8, 12, 16, 20]]
    assert (tmp_path / "overlays.png").stat().st_size > 1000


def test_batch_larger_than_an_epoch_of_crops_is_refused(crops: TrainConfig, data: TrainingData) -> None:
    crops_in_epoch = Batches(crops, data, CPU, World()).unlabeled.count
    with pytest.raises(UserError, match=f"--unlabeled-batch is 100, but there are {crops_in_epoch} unlabeled"):
        load_data(dataclasses.replace(crops, unlabeled_batch=100))
