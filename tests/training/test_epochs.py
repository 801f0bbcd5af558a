"""In which epochs a run validates and saves, and how many steps they have."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from semimoe_fast import checkpoint, train
from semimoe_fast.errors import UserError
from semimoe_fast.training import run_folder
from semimoe_fast.training.config import read_config
from semimoe_fast.training.run import Run


def test_epochs_of_validations_and_checkpoints(tiny_config, tmp_path, monkeypatch):
    saved, save = [], Run.save

    def note(self, name):
        saved.append((name, self.trainer.epoch))
        save(self, name)

    monkeypatch.setattr(Run, "save", note)
    folder = tmp_path / "run"
    train.main(dataclasses.replace(tiny_config, epochs=5, steps_per_epoch=1, val_every=2, save_every=2, out=folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "val" in line] == [1, 3, 4]
    assert [epoch for name, epoch in saved if name == run_folder.LAST] == [2, 4, 5]


@pytest.mark.parametrize("scores", [(0.0, 0.0), (0.3, 0.3), (0.3, 0.2)])
def test_the_best_checkpoint_is_that_of_the_first_best_epoch(tiny_config, tmp_path, monkeypatch, scores):
    validate, given = Run._validate, iter(scores)

    def with_dice(self):
        val = validate(self)
        return val | {"gated": val["gated"] | {"dice": next(given)}}

    monkeypatch.setattr(Run, "_validate", with_dice)
    folder = tmp_path / "run"
    train.main(dataclasses.replace(tiny_config, epochs=2, steps_per_epoch=1, out=folder))
    assert checkpoint.read(folder / run_folder.BEST)[0]["epoch"] == 1


def test_the_baseline_has_no_unsupervised_weight(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config, synthetic=(3, 0, 2), steps_per_epoch=None, labeled_batch=2, epochs=1, warmup_epochs=0
    )
    train.main(dataclasses.replace(config, out=tmp_path / "run"))
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["unsupervised_weight"] == 0
    assert checkpoint.read(tmp_path / "run" / run_folder.LAST)[1]["optim.adaptive.log_vars.step"] == 2  # of 3 images


def test_step_beyond_the_epoch(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    metadata, tensors = checkpoint.read(folder / run_folder.LAST)
    checkpoint.write(folder / run_folder.LAST, metadata | {"epoch": 1, "step": 99}, tensors)
    with pytest.raises(UserError, match="is of epoch 1, step 99, which this run does not have"):
        train.main(dataclasses.replace(read_config(folder), resume=folder))


def test_limits_that_are_allowed(tiny_config):
    for changes in ({"decay": 1.0}, {"scale_jitter": 1.0}, {"scale_jitter": 2.0}, {"initial_log_var": -20.0}):
        dataclasses.replace(tiny_config, **changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_log_var": -20.5}, "--initial-log-var is -20.5: give a number from -20 to 20"),
        ({"image_size": 8}, "--image-size is 8, not a multiple of 16: try 16 or 32"),
    ],
)
def test_limits(tiny_config, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(tiny_config, **changes).check()
