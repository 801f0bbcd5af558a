"""Train and score methods: `python -m benchmarks.peers --data GlaS256 --out runs/accuracy --method cps --seed 0 1 2`.

A run is METHOD-seedS-DIGEST in --out, where DIGEST is that of its arguments and of the files of the images: a JSON file
of scores when it is finished, and the state after its last epoch (.safetensors). The command skips finished runs, and
those that another process trains, and goes on with interrupted ones. So several processes may share the work of one
command.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from benchmarks.record import commit, machine
from semimoe_fast.data.cache import Cache
from semimoe_fast.device import choose_device, configure, in_bf16
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.files import write_text
from semimoe_fast.locks import lock
from semimoe_fast.options import read_options
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig

from .methods import METHODS
from .scores import record
from .training import Splits, Training, load_splits


@dataclasses.dataclass(frozen=True)
class Options:
    """Train methods of semi-supervised segmentation by one code path, and score each after its last epoch."""

    data: Path
    """Folder as of `train --data`, with one train_sup_*, one train_unsup_* and val: a data set or a fold."""
    out: Path
    """Folder of the runs."""
    method: tuple[str, ...] = tuple(METHODS)
    """Methods to train; supervised-all needs the masks of the unlabeled images."""
    seed: tuple[int, ...] = (0,)
    """Seeds of weights, order, augmentation and noise."""
    epochs: int = 100
    """Epochs; the warm-up takes a tenth of them, and the published schedule halves the learning rate every quarter."""
    width: int = 16
    """Channels of the first level of a U-Net; those of -wide methods have more."""
    image_size: int = 128
    """Side of the resized images, in pixels, a multiple of 16."""
    recipe: Literal["published", "strong"] = "published"
    """Defaults of all methods, as `train --recipe` has them."""
    without: tuple[str, ...] = ()
    """Options of the recipe that keep the published value."""
    lr: Annotated[float | None, "FLOAT", "that of the recipe"] = None
    """Learning rate after the warm-up."""
    normalization: Literal["measured", "glas", "crag"] = "measured"
    """Mean and std: of the training images, or published."""
    threads: int = 1
    """Number of CPU threads."""
    device: str = "cpu"
    """Device: auto, cpu, cuda or cuda:N."""

    def config(self, seed: int) -> TrainConfig:
        """The recipe, its schedule shrunk to --epochs. Raises UserError."""
        changes = {name: value for name, value in RECIPES[self.recipe].items() if name not in self.left_out}
        if self.lr is not None:
            changes["lr"] = self.lr
        config = TrainConfig(
            data=self.data, image_size=self.image_size, normalization=self.normalization, width=self.width,
            epochs=self.epochs, warmup_epochs=self.epochs // 10, decay_epochs=max(1, self.epochs // 4),
            seed=seed, threads=self.threads, device=self.device, **changes,
        )  # fmt: skip
        config.check()
        return config

    @property
    def left_out(self) -> list[str]:
        """Fields of --without, sorted. Raises UserError for other names."""
        names = sorted({name.replace("-", "_") for name in self.without})
        if names and self.recipe == "published":
            raise UserError("--without leaves out options of --recipe strong: give that too")
        for name in names:
            if name not in RECIPES[self.recipe]:
                options = ", ".join(RECIPES[self.recipe]).replace("_", "-")
                raise UserError(f"--without is {name}: choose from {options}")
        return names

    @property
    def recipe_name(self) -> str:
        left_out = ", ".join(self.left_out).replace("_", "-")
        return f"{self.recipe} without {left_out}" if left_out else self.recipe


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(Options, "benchmarks.peers", arguments)
    for name in options.method:
        if name not in METHODS:
            raise UserError(f"--method is {name}: choose from {', '.join(METHODS)}")
    configs = [options.config(seed) for seed in options.seed]
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    print(configure(device, configs[0].precision, deterministic=False))
    options.out.mkdir(parents=True, exist_ok=True)
    splits = load_splits(configs[0], Cache(options.out / "cache"), "supervised-all" in options.method)
    for config, name in itertools.product(configs, options.method):
        run(options.out, name, config, options.recipe_name, splits, device)


def run(out: Path, name: str, config: TrainConfig, recipe: str, splits: Splits, device: torch.device) -> None:
    """Train a method to its last epoch and write its scores, unless that is done or another process does it."""
    about = {
        "method": name,
        "seed": config.seed,
        "arguments": arguments_of(config, recipe, device),
        "splits": splits.described,
    }
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    path = out / f"{name}-seed{config.seed}-{digest}"
    with closing(Claim(path.with_suffix(".lock"))) as claim:
        if path.with_suffix(".json").exists():
            print(f"{path.name} is finished")
        elif not claim.held:
            print(f"{path.name} is being trained by another process")
        else:
            result = about | train(path.with_suffix(".safetensors"), name, config, splits, device)
            write_text(path.with_suffix(".json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
            half, swept = (result["scores"][variant]["dice"] for variant in ("at_half", "swept"))
            print(f"{path.name}: Dice {half:.4f} at threshold 0.5, {swept:.4f} swept")


def train(path: Path, name: str, config: TrainConfig, splits: Splits, device: torch.device) -> dict[str, Any]:
    """Train a method from the state in a file, if there is one -> what its record says."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else machine(torch.get_num_threads())
    origin = {"machine": place, "torch": torch.__version__, "commit": commit()}
    training = Training(config, METHODS[name], splits, device)
    if path.exists():
        training.restore(path)
    if origin not in training.origins:
        training.origins.append(origin)
    with tqdm(None, name, config.epochs, initial=training.epoch, unit="epoch", disable=None) as progress:
        while training.epoch < config.epochs:
            training.train_epoch()
            training.save(path)
            progress.update()
    steps = config.epochs * training.batches.steps_per_epoch
    return {
        "steps": steps,
        "images_per_step": sum(training.images_per_step),
        "parameters": sum(p.numel() for p in training.method.parameters() if p.requires_grad),
        "seconds": round(training.seconds, 1),
        "cpu_seconds": round(training.cpu_seconds, 1),
        "origins": training.origins,
        "date": str(datetime.date.today()),
        "scores": record(training.score(splits.val), splits.val),
        "scores_with_tta": record(training.score(splits.val, tta=True), splits.val),
        "curve": training.curve,
    }


def arguments_of(config: TrainConfig, recipe: str, device: torch.device) -> dict[str, Any]:
    """The options that decide the result; of the device its type, which decides the precision."""
    names = "image_size normalization width epochs warmup_epochs decay_epochs lr labeled_batch unlabeled_batch".split()
    precision = "bf16" if in_bf16(config.precision, device) else "fp32"
    values = {name: getattr(config, name) for name in names} | {"device": device.type, "precision": precision}
    if recipe == "published":
        return values
    return values | {name: getattr(config, name) for name in RECIPES["strong"]} | {"recipe": recipe}


class Claim:
    """A run that this process holds, or not, because another one does; the system releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        taken = f"{path} is locked by another process"
        try:
            lock(self.file, path, taken, "let no other process train this run")
            self.held = True
        except UserError as error:
            if str(error) != taken:
                raise
            self.held = False

    def close(self) -> None:
        os.close(self.file)


if __name__ == "__main__":
    run_command(main)
