"""The baseline of the benchmarks, the published trainer, computes the same as ours, with and without each habit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semimoe_fast import functional as F
from semimoe_fast.data import glands
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE
from semimoe_fast.objective import objective
from semimoe_fast.published import EXPERT_PARTS, published_expert_key, rename_expert, rename_gating
from semimoe_fast.training.config import TrainConfig

baseline = pytest.importorskip("benchmarks.baseline", reason="needs the source tree, and tests run from its root")
published = pytest.importorskip("tests.test_published")

HABITS = [field.name for field in dataclasses.fields(baseline.Habits)]
CPU = torch.device("cpu")
CONFIG = TrainConfig(width=4, image_size=32, dropout=0.0, normalization="glas")


def trainer_without(habit: str | None, config: TrainConfig = CONFIG, epoch: int = 0) -> baseline.Baseline:
    return baseline.Baseline(config, CPU, without(habit), epoch)


def without(habit: str | None) -> baseline.Habits:
    return baseline.Habits(**({} if habit is None else {habit: False}))


def random_batch() -> baseline.Batch:
    mask = glands.glands(2, 32, seed=1)[1]
    images, unlabeled = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    return baseline.Batch(images, (mask, *F.distance_targets(mask)), unlabeled)


@pytest.mark.parametrize("habit", [None, *HABITS])
def test_baseline_step_equals_ours(habit: str | None) -> None:
    """In float64, so that the order of summation does not matter."""
    model, adaptive = SemiMoE(width=4).double().train(), AdaptiveMultiObjectiveLoss().double()
    model.gating.dropout.p = 0.0
    trainer = trainer_without(habit)
    trainer.networks.double().load_state_dict(model.state_dict(), strict=False)
    trainer.log_vars.data = trainer.log_vars.data.double()
    batch = random_batch()

    losses = trainer.step(batch._replace(**{k: trainer.to_device(getattr(batch, k)) for k in ("images", "unlabeled")}))
    expected = objective(model, adaptive, batch.images, batch.targets, batch.unlabeled, 0.5 / 200)
    expected.total.backward()

    close = {"rtol": 1e-8, "atol": 1e-11}
    for name, value in losses._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), **close, msg=name)
    torch.testing.assert_close(trainer.log_vars.grad, adaptive.log_vars.grad, **close)
    ours = dict(model.named_parameters())
    for name, parameter in trainer.networks.named_parameters():
        gradient = ours[name].grad if name in ours else torch.zeros_like(parameter)  # a bias before BN has no gradient
        torch.testing.assert_close(parameter.grad, gradient, **close, msg=name)
    statistics = dict(trainer.networks.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(statistics[name], buffer, **close, msg=name)


class Operators(TorchDispatchMode):
    """Counts operators, and reads of device values by Python."""

    def __enter__(self) -> Operators:
        self.count = 0
        self.reads = 0
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        self.reads += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


def operators_of_a_step(habit: str | None) -> Operators:
    trainer, batch = trainer_without(habit), random_batch()
    batch = batch._replace(images=batch.images.float(), unlabeled=batch.unlabeled.float())
    with Operators() as operators:
        trainer.step(batch)
    return operators


def test_each_habit_has_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: flushes.append(True))
    everything = operators_of_a_step(None)
    assert len(flushes) == 3
    operators_of_a_step("empty_cache")
    assert len(flushes) == 3
    assert everything.reads - operators_of_a_step("item_syncs").reads == 5
    for habit in ("conv_bias", "concatenate", "losses_by_formula"):
        assert operators_of_a_step(habit).count < everything.count, habit
    assert [len(trainer_without(habit).optimizers) for habit in (None, "separate_optimizers")] == [5, 2]
    weights = [trainer_without(habit).networks.experts[0].encoder[1][0].weight for habit in (None, "nchw")]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    assert "experts.0.encoder.0.0.bias" not in trainer_without("conv_bias").networks.state_dict()


@pytest.mark.parametrize("keep", [True, False])
def test_pseudo_labels_keep_the_gating_graph_only_as_a_habit(keep: bool) -> None:
    trainer, batch = trainer_without(None if keep else "keep_gating_graph"), random_batch()
    graphs = []
    trainer.networks.gating.register_forward_hook(lambda *call: graphs.append(call[2][0].grad_fn is not None))
    trainer.step(batch._replace(images=batch.images.float(), unlabeled=batch.unlabeled.float()))
    assert graphs == [keep, True]


def test_loader_targets_equal_ours() -> None:
    masks = torch.cat([glands.glands(3, 64, seed=0)[1], torch.zeros(1, 64, 64).byte(), torch.ones(1, 64, 64).byte()])
    for mask in masks:
        sdf, boundary = F.distance_targets(mask)
        results = [torch.from_numpy(array) for array in baseline.targets(mask.numpy())]
        torch.testing.assert_close(results[0], sdf, rtol=0, atol=1e-6)
        torch.testing.assert_close(results[1], boundary, rtol=0, atol=0)


def test_augmentation_transforms_image_and_mask_alike(tmp_path: Path) -> None:
    mask = glands.glands(1, 64, seed=0)[1][0].numpy()
    for name, picture in (("image", np.stack([255 * mask] * 3, -1)), ("mask", mask)):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "0.png")
    config = dataclasses.replace(CONFIG, image_size=64)
    samples = baseline.Samples(tmp_path / "image", tmp_path / "mask", config, with_targets=False)
    seen = set()
    for _ in range(100):
        image, moved = samples[0]
        bright = image[0] > image[0].mean()
        assert (bright != moved.bool()).float().mean() < 0.05  # bilinear and nearest resampling differ at edges
        seen.add(moved.numpy().tobytes())
    assert len(seen) > 30  # 8 symmetries; every second image is one of 81 crops


@pytest.mark.parametrize("habit", [None, "loader_targets"])
def test_training_on_a_folder(glands_folder: Path, habit: str | None) -> None:
    trainer = trainer_without(habit, dataclasses.replace(CONFIG, warmup_epochs=0))
    before = trainer.networks.gating.heads[0].weight.clone()
    trainer.train(trainer.batches(glands_folder, workers=0), 3)  # four unlabeled images make two steps per epoch
    assert not torch.equal(trainer.networks.gating.heads[0].weight, before)
    assert trainer.networks.experts[0].encoder[0][1].num_batches_tracked == 2 * 3  # both batches of every step


@pytest.mark.slow
def test_golden_step(golden) -> None:
    """A step at the published width against golden values of the published code, in float64."""
    expected = golden("network64")
    epoch = round(float(expected["step/unsup_weight"]) / 0.5 * 200) - 1
    trainer = trainer_without(None, dataclasses.replace(CONFIG, width=64, lr=0.0), epoch)
    trainer.networks.double().load_state_dict(published_weights())
    trainer.log_vars.data = trainer.log_vars.data.double()
    images, unlabeled, sdf = (
        torch.from_numpy(expected[key]).double() for key in ("image_labelled", "image_unlabelled", "sdf")
    )
    mask, boundary = (torch.from_numpy(expected[key]) for key in ("mask", "boundary"))
    losses = trainer.step(baseline.Batch(images, (mask, sdf, boundary), unlabeled))

    published.check_golden_losses(losses, trainer.log_vars.grad, expected)
    for part, expert in zip(EXPERT_PARTS, trainer.networks.experts, strict=True):
        for key, parameter in expert.named_parameters():
            published.check_golden_gradient(parameter, f"{part}/{published_expert_key(key)}", expected)


def published_weights() -> dict[str, Tensor]:
    shapes = json.loads((published.GOLDEN / "official_checkpoint_keys.json").read_text())
    named = {part: (f"experts.{e}.", rename_expert) for e, part in enumerate(EXPERT_PARTS)}
    named["gating_model"] = ("gating.", rename_gating)
    return {
        prefix + rename(key): published.seeded_tensor(part, key, shape)
        for part, (prefix, rename) in named.items()
        for key, shape in shapes[part].items()
    }
