"""The configuration of a training run: one dataclass, from which the command line is generated.

The run folder keeps it as config.json and every checkpoint carries it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from ..checkpoint import MOST_PIXELS
from ..device import Compile, Precision
from ..errors import UserError, first_sentence
from ..model import STRIDE
from ..options import read_options
from ..validation import check_types

NONE = "none"
CONFIG_FILE = "config.json"
REMEDY = "restore the file as the run wrote it, or start a new run"
MOST = {
    "width": 4096,
    "image_size": MOST_PIXELS,
    "threads": 4096,
    "seed": 2**63 - 1,
}  # any other integer: what 32 bits hold
PLACE = ("data", "device", "threads", "data_device", "cuda_graph", "profile")  # what a resumed run may change


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train Semi-MoE (arXiv 2509.13834) on few labeled and many unlabeled gland images.

    Without --data it trains on synthetic glands that it draws itself, small enough for a CPU; with --data the defaults
    are the published recipe (add --data DIR to --help to see them).
    """

    data: Annotated[Path | None, "DIR"] = None
    """Folder with the parts below, each PART/image and PART/mask; none: synthetic glands."""
    labeled: Annotated[str | None, "NAME"] = None
    """Labeled part; by default the only train_sup_* of the folder."""
    unlabeled: Annotated[str | None, "NAME"] = None
    """Unlabeled part (its masks are ignored); by default the only train_unsup_*; `none`: the supervised baseline (give
    it as many steps with --steps-per-epoch)."""
    val: str = "val"
    """Validation part."""
    synthetic: tuple[int, int, int] = (8, 64, 80)
    """Synthetic images: labeled (of a laboratory that stains weakly), unlabeled, validation."""
    out: Annotated[Path | None, "DIR"] = None
    """Run folder, new; by default runs/NAME-DATE-TIME."""
    resume: Annotated[Path | None, "RUN"] = None
    """Run folder to continue; it brings its own configuration."""

    image_size: int = 256
    """Side in pixels to which images are resized, a multiple of 16."""
    normalization: Literal["measured", "glas", "crag"] = "measured"
    """Mean and std of the images: measured on the training images, or the published ones of GlaS or CRAG."""
    ring_radius: float = 2.0
    """Width in pixels of the boundary target."""

    width: int = 64
    """Channels of the U-Nets' first level; the deepest has 16 times as many."""

    epochs: int = 200
    """Epochs of the whole run; the schedules below follow it."""
    steps_per_epoch: Annotated[int | None, "INT"] = None
    """Steps of an epoch; by default one pass over the unlabeled part (of the labeled, if alone)."""
    labeled_batch: int = 2
    """Labeled images of a step, of all processes together; a small labeled part is repeated."""
    unlabeled_batch: int = 2
    """Unlabeled images of a step, of all processes together."""
    lr: float = 0.5
    """Learning rate of SGD after the warm-up."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-5
    """Of both optimizers."""
    warmup_epochs: int = 20
    """Epochs in which the learning rate grows from 0."""
    decay_epochs: int = 50
    """Epochs between two decays of the learning rate."""
    decay: float = 0.5
    """Factor on the learning rate at each decay."""
    log_var_lr: float = 0.05
    """Learning rate of Adam for the loss weights s."""
    unsupervised_weight: float = 0.5
    """u of the last epoch; it grows linearly from 0."""
    coefficients: tuple[float, float, float] = (1.0, 0.5, 1.0)
    """Weights of the mask, sdf and boundary objectives ahead of exp(-s)."""
    regularizer: float = 0.4
    """Factor of exp(s) in the adaptive loss."""
    initial_log_var: float = 1.0
    """s at the start."""
    dropout: float = 0.1
    """In the gates."""
    accumulate: Annotated[int, "PARTS"] = 1
    """Cut every batch into so many parts, trained one after the other before the optimizer's step: less memory, but
    batch normalization sees each part alone."""
    joint_forward: bool = False
    """Labeled and unlabeled images as one batch through the U-Nets: fewer, larger kernels, but batch normalization
    sees both together."""
    ema: Annotated[float | None, "DECAY"] = None
    """Validate, and keep as best, a moving average of the weights, in which a step weighs DECAY times as much as the
    next: 0.99 averages over about 100 steps."""
    scale_lr: bool = False
    """Multiply --lr by the images of a step over those of the published recipe (2 labeled and 2 unlabeled)."""
    sync_bn: bool = False
    """Batch normalization over the batches of all processes (torchrun); without it each normalizes its own rows."""

    val_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    save_every: int = 1
    """Epochs between two checkpoints."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""
    compile: Compile = "none"
    """torch.compile of the U-Nets: default, or max with kernels chosen by trial. It takes a minute or more."""
    cuda_graph: bool = True
    """Replay the whole step as one CUDA graph, where a single CUDA device trains."""
    deterministic: bool = False
    """The same bits again from the same seed on a GPU too, at some cost in speed; on the CPU that is so anyway."""
    data_device: Literal["auto", "device", "host"] = "auto"
    """Where the images wait: auto keeps them on the device unless they would take half of its free memory."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes CUDA where there is one."""
    threads: Annotated[int | None, "INT"] = None
    """CPU threads; by default as many as torch takes. Runs are bitwise equal at equal numbers of threads."""
    profile: bool = False
    """Profile a few early steps: where their time goes as a table, and a Chrome trace in the run folder."""
    seed: int = 0
    """Of weights, order, augmentation, dropout and synthetic images."""

    @property
    def semi_supervised(self) -> bool:
        return self.unlabeled != NONE

    def check(self, processes: int = 1) -> None:
        """Raise UserError for values that so many processes cannot train with, before anything is read or written."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else [values]:
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"{flag(field.name)} is {value}: give a finite number")
                if isinstance(value, int) and value > (most := MOST.get(field.name, 2**31 - 1)):
                    raise UserError(f"{flag(field.name)} is {value}: give at most {most}")
        positive = (
            "image_size width epochs labeled_batch unlabeled_batch decay_epochs val_every save_every lr log_var_lr "
            "accumulate"
        ).split()
        for name in (*positive, *(n for n in ("steps_per_epoch", "threads") if getattr(self, n) is not None)):
            if not getattr(self, name) > 0:
                raise UserError(f"{flag(name)} is {getattr(self, name)}: give a positive number")
        for name in "momentum weight_decay warmup_epochs unsupervised_weight regularizer ring_radius seed".split():
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} is {getattr(self, name)}: give 0 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give a number from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"--ema is {self.ema}: give a decay between 0 and 1, such as 0.999")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay is {self.decay}: give a factor above 0 and up to 1")
        if self.image_size % STRIDE:
            below = max(STRIDE, self.image_size // STRIDE * STRIDE)
            raise UserError(
                f"--image-size is {self.image_size}, not a multiple of {STRIDE}: try {below} or {below + STRIDE}"
            )
        self._check_shares(processes)
        if self.data is None and (min(self.synthetic) < 0 or min(self.synthetic[0], self.synthetic[2]) < 1):
            raise UserError(f"--synthetic is {self.synthetic}: give at least one labeled and one validation image")

    def _check_shares(self, processes: int) -> None:
        """That every process, and every part of a batch, gets equally many images, and enough."""
        parts = processes * self.accumulate
        sharers = [f"{processes} processes"] if processes > 1 else []
        sharers += [f"--accumulate {self.accumulate}"] if self.accumulate > 1 else []
        batches = ["labeled_batch", *(["unlabeled_batch"] if self.semi_supervised else [])]
        for name in batches:
            if (batch := getattr(self, name)) % parts:
                raise UserError(
                    f"{flag(name)} is {batch}, which {' and '.join(sharers)} cannot share: give a multiple of {parts}"
                )
        if self.image_size == STRIDE and min(getattr(self, name) for name in batches) == parts:
            shared = f" for {' and '.join(sharers)}" if sharers else ""
            raise UserError(
                f"--image-size is {STRIDE} and a batch {parts}{shared}: "
                "batch normalization then sees a single pixel; enlarge either"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the run folder's own place (out, resume) and a look at its speed are not part of them."""
        values = dataclasses.asdict(self)
        for name in ("out", "resume", "profile"):
            del values[name]
        lists = {name: list(values[name]) for name in ("synthetic", "coefficients")}
        return values | lists | {"data": None if self.data is None else str(self.data.resolve())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """What `to_dict` gave."""
        tuples = {name: tuple(values[name]) for name in ("synthetic", "coefficients")}
        return cls(**values | tuples | {"data": None if values["data"] is None else Path(values["data"])})


SYNTHETIC = TrainConfig(  # few steps, so a shorter schedule; larger batches steady the statistics of small images
    image_size=64,
    width=8,
    epochs=40,
    warmup_epochs=5,
    decay_epochs=7,
    labeled_batch=4,
    unlabeled_batch=4,
    val_every=4,
    threads=1,  # at this size a second one gains nothing
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(arguments: Sequence[str] | None = None, processes: int = 1) -> TrainConfig:
    """The configuration that a command line asks for, checked. Raises UserError; exits by itself for --help."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # these two decide on the defaults
    first_look.add_argument("--data", nargs="?")
    first_look.add_argument("--resume", nargs="?", type=Path)
    given, _ = first_look.parse_known_args(arguments)
    if given.resume is not None:
        default = dataclasses.replace(read_config(given.resume), resume=given.resume)
    else:
        default = SYNTHETIC if given.data is None else TrainConfig()
    config = read_options(TrainConfig, "semimoe_fast.train", arguments, default)
    if config.resume is not None:
        _refuse_changes(default, config)
    config.check(processes)
    return config


def read_config(run: Path) -> TrainConfig:
    """The configuration of an existing run folder."""
    path = run / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run}: holds no run to resume ({CONFIG_FILE} is missing); give the folder of a run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({first_sentence(error)}); {REMEDY}") from error
    hints = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name in SYNTHETIC.to_dict()}
    check_types(path, "the configuration", values, hints, REMEDY)
    if unknown := values.keys() - hints.keys():
        raise UserError(f"{path}: has {min(unknown)!r}, which is no option of this version; {REMEDY}")
    return TrainConfig.from_dict(values)


def _refuse_changes(stored: TrainConfig, config: TrainConfig) -> None:
    """A resumed run keeps its configuration, but for where and how it computes the same."""
    for field in dataclasses.fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(config, field.name)
        if before != now and field.name == "out":
            raise UserError(f"--out is {now}, but --resume {stored.resume} continues in its own folder: leave one out")
        if before != now and field.name not in PLACE:
            raise UserError(
                f"{flag(field.name)} is {now}, but the run in {stored.resume} was started with "
                f"{'none' if before is None else before}: "
                "leave it out, or start a new run"
            )
