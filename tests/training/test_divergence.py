"""A diverged run stops with one line, and keeps the checkpoints that it had."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from refusals import refused
from runs import start

from semimoe_fast import checkpoint, train
from semimoe_fast.checkpoint import first_non_finite
from semimoe_fast.errors import UserError
from semimoe_fast.training import divergence, run_folder
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.trainer import Trainer

ONE_STEP = {"epochs": 1, "steps_per_epoch": 1, "warmup_epochs": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e38}, "the prediction 'gated' has values that are not finite in epoch 1: restart with smaller --lr"),
        (
            {"lr": 1e6, "steps_per_epoch": 6},
            r"\S+ has values that are not finite in epoch 1: restart with smaller --lr",
        ),
        (
            {"lr": 1e38, "steps_per_epoch": 2},
            "the supervised mask loss became nan in epoch 1: restart with smaller --lr",
        ),
        ({"regularizer": 1e38}, "the supervised loss became inf in epoch 1: restart with smaller --coefficients"),
        (
            {"log_var_lr": 1e30},
            "weight of the mask loss became inf in epoch 1: restart with smaller --log-var-lr",
        ),
    ],
)
def test_diverged_run_stops_and_names_what_diverged(
    tiny_config: TrainConfig, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.main(dataclasses.replace(tiny_config, out=tmp_path / "run", **ONE_STEP | changes))
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_checkpoints_before_the_divergence_stay(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch a step makes a weight NaN that no loss depends on any more."""
    step = Trainer.train_step

    def spoiled(self: Trainer, batch: object) -> None:
        step(self, batch)
        if self.epoch == 1 and self.step == 1:  # the last of its steps
            self.model.gating.heads[0].bias.data.fill_(torch.nan)

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    folder = tmp_path / "run"
    assert refused(train.main, dataclasses.replace(tiny_config, out=folder)) == (
        "gating.heads.0.bias has values that are not finite in epoch 2: restart with smaller "
        f"{divergence.OF_STEPS}; {folder / run_folder.LAST} was saved before"
    )
    for name in (run_folder.BEST, run_folder.LAST):
        metadata, tensors = checkpoint.read(folder / name)
        assert metadata["epoch"] == 1
        assert first_non_finite(tensors) is None


def test_first_non_finite_tensor_is_named() -> None:
    tensors = {
        "count": torch.tensor(3),
        "a": torch.zeros(2),
        "b": torch.tensor([1, torch.inf]),
        "c": torch.tensor(torch.nan),
    }
    assert first_non_finite(tensors) == "b"
    assert first_non_finite({"count": torch.tensor(3)}) is None


def test_checkpoint_with_non_finite_weights_is_refused(finished: Path, tmp_path: Path) -> None:
    model, metadata, _ = checkpoint.load(finished / run_folder.BEST)
    model.gating.heads[1].bias.data.fill_(torch.inf)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, {name: metadata[name] for name in metadata if name not in ("format", "model")})
    with pytest.raises(UserError, match=re.escape(f"{path}: gating.heads.1.bias has values that are not finite")):
        checkpoint.load(path)


@pytest.mark.slow
def test_diverged_run_of_two_processes_ends_both_with_one_line(tiny_config: TrainConfig, tmp_path: Path) -> None:
    batches = {"labeled_batch": 2, "unlabeled_batch": 2, "accumulate": 1}
    config = dataclasses.replace(tiny_config, **ONE_STEP, **batches, lr=1e38)
    ended = [child.wait() for child in start(config, tmp_path / "run", 2)]
    assert [end.status for end in ended] == [2, 2]
    told = "".join(end.output for end in ended)
    assert len(re.findall("^error: .* in epoch 1: restart with smaller --lr", told, re.MULTILINE)) == 1
    assert "Traceback" not in told
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_the_unsupervised_loss_is_named(tmp_path: Path) -> None:
    totals = {"supervised_total": 1.0, "unsupervised_total": math.inf, "total": math.inf}
    losses = totals | dict.fromkeys(("supervised_terms", "unsupervised_terms", "loss_weights"), [1.0] * 3)
    with pytest.raises(UserError, match="the unsupervised loss became inf in epoch 1: restart with smaller --coeff"):
        divergence.require_finite(losses, {}, 0, tmp_path)
