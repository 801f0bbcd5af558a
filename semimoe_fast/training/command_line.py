"""The command line of a training run.

Its defaults are those of a recipe, changed for the synthetic glands, or the options of the run to resume.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..options import read_options
from .config import MUTABLE, NONE, TrainConfig, flag, read_config

RECIPES: dict[str, dict[str, Any]] = {  # defaults that differ from the paper's
    "published": {},
    "strong": {"optimizer": "adamw", "lr": 0.015, "schedule": "cosine", "ema": 0.99, "scale_jitter": 2.0},
}
SYNTHETIC = TrainConfig(  # a short schedule for a CPU; larger batches give small images steadier BN statistics
    image_size=64,
    width=8,
    epochs=40,
    warmup_epochs=5,
    decay_epochs=7,
    labeled_batch=4,
    unlabeled_batch=4,
    val_every=4,
    threads=1,  # a second thread gains nothing at this size
)


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """Defaults of the options below; a run stores the options themselves."""

    recipe: Literal["published", "strong"] = "published"
    """Defaults of options below: the paper's, or ours (docs/training.md)."""


@dataclasses.dataclass(frozen=True)
class CommandLine(*TrainConfig.__bases__, RecipeOptions):
    __doc__ = TrainConfig.__doc__


def parse(arguments: Sequence[str] | None = None, processes: int = 1) -> TrainConfig:
    """The configuration of a command line, checked; --help prints the options and exits.

    arguments: sys.argv[1:] if None. processes: number of processes that train together. Raises UserError.
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # these options decide the defaults
    first_look.add_argument("--data", nargs="?")
    first_look.add_argument("--resume", nargs="?", type=Path)
    first_look.add_argument("--recipe", nargs="?")
    given, _ = first_look.parse_known_args(arguments)
    if given.resume is not None:
        if given.recipe is not None:
            raise UserError(f"--recipe is for a new run: leave it out, the run in {given.resume} keeps its options")
        default = dataclasses.replace(read_config(given.resume), resume=given.resume)
    else:
        default = SYNTHETIC if given.data in (None, "None") else TrainConfig()  # tyro reads "None" as none
        default = dataclasses.replace(default, **RECIPES.get(given.recipe, {}))
    values = vars(read_options(CommandLine, "semimoe_fast.train", arguments, CommandLine(**vars(default)))).copy()
    del values["recipe"]  # its values are the defaults
    config = TrainConfig(**values)
    if config.resume is not None:
        _refuse_changes(default, config)
    _refuse_unused(default, config)
    config.check(processes)
    return config


def _refuse_changes(stored: TrainConfig, config: TrainConfig) -> None:
    """Raise UserError if an option that is not in MUTABLE differs from the stored run."""
    for field in dataclasses.fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(config, field.name)
        if before != now and field.name == "out":
            raise UserError(f"--out is {now}, but --resume {stored.resume} writes to its own folder: leave out one")
        if before != now and field.name not in MUTABLE:
            schedule = ", as the schedule depends on it" if field.name == "epochs" else ""
            raise UserError(
                f"{flag(field.name)} is {now}, but the run in {stored.resume} was started with "
                f"{'none' if before is None else before}: leave it out, or start a new run{schedule}"
            )


def _refuse_unused(default: TrainConfig, config: TrainConfig) -> None:
    """Raise UserError if an option differs from its default, but changes nothing beside the others."""
    unused = {
        "with --schedule cosine": ("decay", "decay_epochs") if config.schedule == "cosine" else (),
        "with --optimizer adamw": ("momentum",) if config.optimizer == "adamw" else (),
        "without --data": ("labeled", "val") if config.data is None else (),
        "with --data": ("synthetic",) if config.data is not None else (),
    }
    for reason, names in unused.items():
        for name in names:
            if (value := getattr(config, name)) != getattr(default, name):
                raise UserError(f"{flag(name)} is {value}, which changes nothing {reason}: leave it out")
    if config.data is None and config.unlabeled not in (None, NONE):
        raise UserError(f"--unlabeled is {config.unlabeled}, but there is no --data: leave it out, or give none")
