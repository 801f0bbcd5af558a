"""A run whose losses or weights are not finite stops, so that its checkpoints are never those of a diverged model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ..checkpoint import first_non_finite
from ..errors import UserError
from .run_folder import LAST

TERMS = "mask", "sdf", "boundary"
OF_STEPS = "--lr or --weight-decay"
OF_SUMS = "--coefficients, --regularizer, --unsupervised-weight or --log-var-lr"
OF_LOG_VARS = "--log-var-lr"


def require_finite(record: Mapping[str, Any], state: Mapping[str, Tensor], epoch: int, folder: Path) -> None:
    """Raise UserError if a loss of an epoch or a tensor of a state dict has NaN or inf.

    record: losses as `Trainer.epoch_means` gives them. The message names the first such loss or tensor, the epoch, the
    options to change and, if the run folder has one, the last checkpoint.
    """
    for name, value, options in _losses(record):
        if not math.isfinite(value):
            stop(f"{name} became {value}", epoch, options, folder)
    if (name := first_non_finite(state)) is not None:
        stop(f"{name} has values that are not finite", epoch, OF_STEPS, folder)


def _losses(record: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Name, value, and the options that make it smaller; causes are before what follows from them."""
    for part in ("supervised", "unsupervised"):
        for task, value in zip(TERMS, record[f"{part}_terms"], strict=True):
            yield f"the {part} {task} loss", value, OF_STEPS
    for part in ("supervised", "unsupervised"):
        yield f"the {part} loss", record[f"{part}_total"], OF_SUMS
    yield "the loss", record["total"], OF_SUMS
    for task, value in zip(TERMS, record["loss_weights"], strict=True):
        yield f"the adaptive weight of the {task} loss", value, OF_LOG_VARS


def stop(what: str, epoch: int, options: str, folder: Path) -> NoReturn:
    """Raise the UserError of a run that has diverged. The message counts epochs from 1, as all lines of a run do."""
    kept = f"; {folder / LAST} was saved before" if (folder / LAST).exists() else ""
    raise UserError(f"{what} in epoch {epoch + 1}: restart with smaller {options}{kept}")
