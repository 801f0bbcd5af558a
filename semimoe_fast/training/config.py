"""The configuration of a training run: one dataclass, from which `options` generates the command line.

The run folder stores it as config.json, and every checkpoint holds a copy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from ..checkpoint import MOST_PIXELS, Sampling
from ..data.appearance import Strengths
from ..data.regions import PLAUSIBLE_MPP
from ..device import Compile, Precision
from ..errors import UserError, first_sentence
from ..model import STRIDE
from ..validation import check_types

NONE = "none"
CONFIG_FILE = "config.json"
REMEDY = "restore the file as the run wrote it, or start a new run"
LARGEST = {  # other integers: 2**31 - 1
    "width": 4096,
    "image_size": MOST_PIXELS,
    "threads": 1024,
    "seed": 2**63 - 1,
}
MOST_FLOAT = 3.4e38  # a float32
MOST_STRENGTHS = {"stain": 1, "brightness": 1, "blur": 5, "noise": 1}
MOST_JITTER = 2  # mirror images fill up to 3/4 of a square, and `augment.resample` mirrors an image once
MOST_LOG_VAR = 20  # exp(20) is 5e8; the losses are at most about 1
MUTABLE = ("data", "device", "threads", "data_device", "cuda_graph", "recompute", "profile")  # --resume may change them


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Without --data, the run draws synthetic glands."""

    data: Annotated[Path | None, "DIR", "synthetic glands"] = None
    """Folder of the parts, each PART/image and PART/mask."""
    labeled: Annotated[str | None, "NAME", "the only train_sup_*"] = None
    """Labeled part of the folder."""
    unlabeled: Annotated[str | None, "NAME", "the only train_unsup_*"] = None
    """Unlabeled part; `none` trains the supervised baseline."""
    val: Annotated[str, "NAME"] = "val"
    """Validation part of the folder."""
    synthetic: Annotated[tuple[int, int, int], "INT INT INT"] = (8, 64, 80)
    """Numbers of labeled, unlabeled and validation images to draw."""
    image_size: int = 256
    """Side of resized images or of crops, in pixels, a multiple of 16."""
    sampling: Sampling = "resize"
    """Whole images as squares, or random crops at their own scale."""
    antialias: bool = False
    """Shrink images with antialiasing; for --sampling resize."""
    mpp: Annotated[float | None, "MICRONS", "that of the files"] = None
    """Microns per pixel of crops: images are resampled to it."""
    normalization: Literal["measured", "glas", "crag"] = "measured"
    """Mean and std: of the training images, or published."""
    ring_radius: float = 2.0
    """Width of the boundary target, in pixels."""
    instances: bool = False
    """Keep touching glands apart: masks hold an id per gland, 0 is background."""


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of training images, beside crops and the symmetries of the square; at 0 the last four are off."""

    scale_jitter: Annotated[float | None, "FACTOR", "crops to 7/8; 1.25 with --sampling crops"] = None
    """Magnify by 1 / FACTOR to FACTOR, up to 2."""
    stain: float = 0.0
    """Largest change of H and E: relative, and in optical density; 0.2 is strong."""
    brightness: float = 0.0
    """Largest relative change of brightness, up to 1."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels, up to 5."""
    noise: float = 0.0
    """Largest standard deviation of the noise, relative to the pixels' range."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Three expert U-Nets and the gating network."""

    width: int = 64
    """Channels of a U-Net's first level; the deepest has 16 times as many."""
    dropout: float = 0.1
    """Dropout probability in the gates."""
    sync_bn: bool = False
    """Compute BN statistics over all processes, not per process."""


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Steps, learning rate and optimizers. All processes share a batch."""

    epochs: int = 200
    """Number of epochs."""
    steps_per_epoch: Annotated[int | None, "INT", "a pass over the unlabeled part"] = None
    """Steps in an epoch; with crops a pass is area/crop area."""
    labeled_batch: int = 2
    """Labeled images in a step; a small part is repeated."""
    unlabeled_batch: int = 2
    """Unlabeled images in a step."""
    accumulate: Annotated[int, "PARTS"] = 1
    """Split a batch into PARTS: less memory, BN statistics per part."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of the networks; AdamW needs a smaller --lr."""
    lr: float = 0.5
    """Learning rate after the warm-up."""
    scale_lr: bool = False
    """Multiply --lr by the images in a step / 4 (supervised baseline: / 2)."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-5
    """Weight decay, also of the learned loss weights; of the networks decoupled from the gradients in AdamW."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Decay of --lr after the warm-up: in steps, or toward 0 by a cosine."""
    warmup_epochs: int = 20
    """Epochs in which the learning rate grows linearly, with --schedule steps from 0."""
    decay_epochs: int = 50
    """Epochs between two decays of --schedule steps."""
    decay: float = 0.5
    """Factor of each decay."""
    ema: Annotated[float | None, "DECAY", "off"] = None
    """Validate an EMA of the weights; 0.99 averages about 100 steps."""
    seed: int = 0
    """Seed of weights, order, augmentation, dropout and synthetic images."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Labeled loss + u * unlabeled loss; each is sum(coefficient * exp(-s) * term + regularizer * exp(s))."""

    coefficients: Annotated[tuple[float, float, float], "MASK SDF BOUNDARY"] = (1.0, 0.5, 1.0)
    """Fixed coefficients of the three terms."""
    regularizer: float = 0.4
    """Coefficient of exp(s)."""
    initial_log_var: float = 1.0
    """Initial value of every s."""
    log_var_lr: float = 0.05
    """Adam learning rate of s."""
    unsupervised_weight: float = 0.5
    """Value of u in the last epoch; u grows linearly from 0."""


@dataclasses.dataclass(frozen=True)
class ComputingOptions:
    """Device and speed. Results are bitwise reproducible on the CPU with the same number of threads."""

    device: Annotated[str, "NAME"] = "auto"
    """Device: cpu, cuda or cuda:N; auto takes CUDA if available."""
    threads: Annotated[int | None, "INT", "torch's choice"] = None
    """Number of CPU threads."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto: bf16 on CUDA, fp32 on the CPU."""
    compile: Compile = "none"
    """Compile the U-Nets with torch.compile (a minute or more); max also tunes."""
    cuda_graph: bool = True
    """Replay a step as one CUDA graph, if a single CUDA device trains."""
    recompute: bool = False
    """Compute normalization again in the backward pass: less memory, more time."""
    deterministic: bool = False
    """Make runs on a GPU bitwise reproducible, but slower."""
    data_device: Literal["auto", "device", "host"] = "auto"
    """Memory for the images; auto: device if they fill at most half of it."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """A run folder holds the configuration, metrics, checkpoints and pictures."""

    out: Annotated[Path | None, "DIR", "runs/NAME-DATE-TIME"] = None
    """New run folder."""
    resume: Annotated[Path | None, "RUN", "a new run"] = None
    """Run folder to continue with its own configuration."""
    val_every: int = 1
    """Epochs from one validation to the next; the last epoch has one."""
    save_every: int = 1
    """Epochs from one checkpoint to the next."""
    profile: bool = False
    """Print where the time of a few early steps goes; write a Chrome trace."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(  # fields and help start with the last base
    OutputOptions, ComputingOptions, LossOptions, ScheduleOptions, ModelOptions, AugmentationOptions, DataOptions
):
    """Train Semi-MoE (arXiv 2509.13834) on few labeled and many unlabeled gland images.

    Without --data, the images are synthetic glands and the defaults suit a CPU. With --data, the defaults are the
    published recipe: `--data DIR --help` shows them. --recipe changes some of either.
    """

    @property
    def semi_supervised(self) -> bool:
        return self.unlabeled != NONE and (self.data is not None or self.synthetic[1] > 0)

    @property
    def images_per_step(self) -> int:
        return self.labeled_batch + (self.unlabeled_batch if self.semi_supervised else 0)

    @property
    def base_lr(self) -> float:
        """--lr, with --scale-lr times the images of a step relative to the published 4 (supervised: 2).

        The linear scaling rule, arXiv 1706.02677.
        """
        published = 4 if self.semi_supervised else 2
        return self.lr * self.images_per_step / published if self.scale_lr else self.lr

    @property
    def strengths(self) -> Strengths:
        return Strengths(self.stain, self.brightness, self.blur, self.noise)

    @property
    def centered_masks(self) -> bool:
        """Whether pixels of a resized mask are those at their centers; the published ones lie half a pixel before."""
        return self.sampling == "crops" or self.scale_jitter is not None

    def check(self, processes: int = 1) -> None:
        """Raise UserError for a value that a run of `processes` processes cannot train with."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else [values]:
                if isinstance(value, float) and not abs(value) <= MOST_FLOAT:
                    raise UserError(
                        f"{flag(field.name)} is {value}: give a number from -{MOST_FLOAT:g} to {MOST_FLOAT:g}"
                    )
                if isinstance(value, int) and value > (most := LARGEST.get(field.name, 2**31 - 1)):
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
        if min(self.coefficients) < 0 or max(self.coefficients) == 0:
            raise UserError(f"--coefficients is {self.coefficients}: give numbers of 0 or more, not all of them 0")
        if abs(self.initial_log_var) > MOST_LOG_VAR:
            raise UserError(
                f"--initial-log-var is {self.initial_log_var}: give a number from -{MOST_LOG_VAR} to {MOST_LOG_VAR}"
            )
        for name, most in MOST_STRENGTHS.items():
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{flag(name)} is {getattr(self, name)}: give a number from 0 to {most:g}")
        if self.scale_jitter is not None and not 1 <= self.scale_jitter <= MOST_JITTER:
            raise UserError(
                f"--scale-jitter is {self.scale_jitter}: give a factor from 1 to {MOST_JITTER}, or None for the "
                "published crops"
            )
        self._check_sampling()
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give a number from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"--ema is {self.ema}: give a decay between 0 and 1, such as 0.999, or None")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay is {self.decay}: give a factor above 0 and up to 1")
        if self.schedule == "cosine" and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"--warmup-epochs is {self.warmup_epochs} of {self.epochs} epochs, which leaves none to --schedule "
                "cosine: give a smaller number"
            )
        if self.image_size % STRIDE:
            below = max(STRIDE, self.image_size // STRIDE * STRIDE)
            raise UserError(
                f"--image-size is {self.image_size}, not a multiple of {STRIDE}: try {below} or {below + STRIDE}"
            )
        if self.recompute and self.compile != "none":
            raise UserError(
                f"--recompute has no effect on U-Nets that --compile {self.compile} compiles: leave out either"
            )
        self._check_shares(processes)
        if self.data is None and (min(self.synthetic) < 0 or min(self.synthetic[0], self.synthetic[2]) < 1):
            raise UserError(f"--synthetic is {self.synthetic}: give at least one labeled and one validation image")

    def _check_sampling(self) -> None:
        """Raise UserError for options that the kind of sampling does not take."""
        if self.sampling == "crops" and self.data is None:
            raise UserError(
                "--sampling crops needs --data: write images with `python -m semimoe_fast.synthetic --sizes MIN MAX`"
            )
        if self.sampling == "crops" and self.antialias:
            raise UserError(
                "--antialias is for --sampling resize: leave it out; images that --mpp shrinks are always antialiased"
            )
        if self.mpp is None:
            return
        if self.sampling == "resize":
            raise UserError(
                f"--mpp is {self.mpp}, but --sampling resize scales images by their sides: leave it out, or give "
                "--sampling crops"
            )
        low, high = PLAUSIBLE_MPP
        if not low <= self.mpp <= high:
            raise UserError(f"--mpp is {self.mpp}: give microns per pixel from {low:g} to {high:g}")

    def _check_shares(self, processes: int) -> None:
        """Raise UserError unless every part of a batch on every process has the same number of images, and enough."""
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
        """The options as JSON values, without out, resume and profile, which do not change the results."""
        values = dataclasses.asdict(self)
        for name in ("out", "resume", "profile"):
            del values[name]
        lists = {name: list(values[name]) for name in ("synthetic", "coefficients")}
        return values | lists | {"data": None if self.data is None else str(self.data.resolve())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; out, resume and profile get their defaults."""
        tuples = {name: tuple(values[name]) for name in ("synthetic", "coefficients")}
        return cls(**values | tuples | {"data": None if values["data"] is None else Path(values["data"])})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_config(run: Path) -> TrainConfig:
    """The configuration that a run folder stores. Raises UserError if the file is missing or damaged."""
    path = run / CONFIG_FILE
    if run.is_file() and (run.parent / CONFIG_FILE).is_file():
        raise UserError(f"{run}: is a file of a run; give its folder, {run.parent}")
    if not path.is_file():  # reading a named pipe would wait forever
        raise UserError(f"{run}: holds no run to resume ({CONFIG_FILE} is no file there); give the folder of a run")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({first_sentence(error)}); {REMEDY}") from error
    hints = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name in TrainConfig().to_dict()}
    check_types(path, "the configuration", values, hints, REMEDY)
    if unknown := values.keys() - hints.keys():
        raise UserError(f"{path}: has {min(unknown)!r}, which is no option of this version; {REMEDY}")
    return TrainConfig.from_dict(values)
