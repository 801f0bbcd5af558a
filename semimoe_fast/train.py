"""Train Semi-MoE: `python -m semimoe_fast.train`, `--help` for everything it takes.

A run folder holds config.json, metrics.jsonl (a line an epoch), best.safetensors and last.safetensors, curves.png and
overlays.png, and is locked while a process trains in it. A run that was interrupted or killed continues with
`--resume FOLDER` and ends as if it had not been.

Images from --data are decoded by the first of the runs that lie beside each other; the others find them in `cache`.

`torchrun --nproc-per-node N -m semimoe_fast.train` trains the same run on N devices; rank 0 alone writes and prints.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import record_function
from tqdm import tqdm

from . import checkpoint, distributed, records, report
from .batches import TrainingData
from .cache import Cache
from .checkpoint import REMEDY, Preprocessing
from .config import CONFIG_FILE, NONE, PLACE, TrainConfig, parse
from .data import Dataset
from .device import configure
from .distributed import World
from .errors import UserError, first_sentence, run_command, warn
from .evaluate import GATED, count_set, score_set
from .lock import FolderLock
from .profile import PAUSE, StepProfile
from .sources import load_data
from .trainer import Trainer, states_of_ranks
from .validation import check_types

RUNS = Path("runs")
METRICS_FILE = "metrics.jsonl"
BEST, LAST = "best.safetensors", "last.safetensors"


def main(arguments: Sequence[str] | TrainConfig | None = None) -> None:
    """Train as a command line says, that of the process by default, or as a configuration does. Raises UserError."""
    with FolderLock() as lock:
        run = train(arguments, lock)
        if run.world.leads:
            run.report()


def train(arguments: Sequence[str] | TrainConfig | None, lock: FolderLock) -> Run:
    """Train to the last epoch; exits where a signal interrupts that."""
    with distributed.join() as world:
        config = world.leader_first(lambda: configuration(arguments, world, lock))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = world.device(config.device)
        settings = configure(device, config.precision, config.deterministic)
        cache = Cache(cache_folder(config), writes=world.leads)
        data, val = world.leader_first(lambda: load_data(config, cache))  # the others find what it decoded
        if config.resume:
            run = Run.resume(config, data, val, device, world)
        else:
            run = Run.start(config, data, val, device, world, lock)
        if world.leads:
            print(f"{settings}; {run.trainer.settings}", flush=True)
        remedy = f"continue with: {world.command} --resume {run.folder}"
        with Interruption(world) as interruption, world.watched(remedy):
            if not run.train(interruption):
                if world.leads:
                    print(f"interrupted by {interruption.name}; {remedy}", flush=True)
                sys.exit(128 + interruption.received)
    return run


def configuration(given: Sequence[str] | TrainConfig | None, world: World, lock: FolderLock) -> TrainConfig:
    """What is asked for, checked, once its run folder is known to be free: to decode the images may take hours."""
    if isinstance(given, TrainConfig):
        config = given
        config.check(world.size)
    else:
        config = parse(given, world.size)
    if world.leads and config.resume is not None:
        lock.take(config.resume)
    elif world.leads and config.out is not None:
        refuse_used(config.out)
    return config


class Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the step under way can finish; a second one ends the process.

    Called after every step, it tells whether any rank got one, on all of them at the same step. A second one does not
    end them: torchrun hands on what reached them before, and ends them itself after half a minute.
    """

    def __init__(self, world: World) -> None:
        self.world, self.received = world, 0

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        agreed = self.world.agree(self.received)
        if agreed:  # else leave it: a signal may have come meanwhile
            self.received = agreed
        return agreed != 0

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if self.world.size == 1:
            signal.signal(number, self.previous[number])


@dataclass
class Run:
    """A run folder and the trainer that fills it."""

    config: TrainConfig
    folder: Path
    trainer: Trainer
    val: Dataset
    world: World
    best_dice: float = -1.0

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        data: TrainingData,
        val: Dataset,
        device: torch.device,
        world: World,
        lock: FolderLock,
    ) -> Run:
        """A new run in a new folder, which is locked from then on."""
        trainer = Trainer(config, data, device, world)
        folder = Path(world.told(lambda: str(new_folder(config, lock))))
        return cls(config, folder, trainer, val, world)

    @classmethod
    def resume(cls, config: TrainConfig, data: TrainingData, val: Dataset, device: torch.device, world: World) -> Run:
        """The run of an existing folder, which is locked already, where its last checkpoint left it."""
        run = cls(config, config.resume, Trainer(config, data, device, world), val, world)
        path = run.folder / LAST
        if not path.is_file():
            return run  # killed before its first checkpoint: the seed makes it start over as it did
        metadata, tensors = checkpoint.read(path)
        expected = run.metadata()
        if without_place(metadata.get("config")) != without_place(expected["config"]):
            raise UserError(f"{path}: is of another configuration than {run.folder / CONFIG_FILE}; start a new run")
        if metadata.get("data") != expected["data"]:
            raise UserError(
                f"{path}: the images have changed since, or are others; restore them, give their folder as --data, or "
                "start a new run"
            )
        check_types(path, "its metadata", metadata, {"epoch": int, "step": int, "best_dice": float}, REMEDY)
        epoch, step = metadata["epoch"], metadata["step"]
        if not (0 <= epoch <= config.epochs and 0 <= step <= run.trainer.steps_per_epoch):
            raise UserError(f"{path}: is of epoch {epoch}, step {step}, which this run does not have; {REMEDY}")
        try:
            run.trainer.restore(tensors, epoch, step)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{path}: its tensors are not those of this run ({first_sentence(error)}); {REMEDY}"
            ) from error
        if (before := len(states_of_ranks(tensors))) != world.size and world.leads:
            print(f"{path}: is of {before} processes, now {world.size}: dropout goes on with other random numbers")
        run.best_dice = metadata["best_dice"]
        return run

    def train(self, interruption: Interruption) -> bool:
        """Train to the last epoch; False if interrupted, with the checkpoint written."""
        trainer, steps = self.trainer, self.trainer.steps_per_epoch
        if self.world.leads:
            records.truncate(self.folder / METRICS_FILE, trainer.epoch)
        done = trainer.epoch * steps + trainer.step
        pace = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines; a log file needs few
        bar = {"initial": done, "unit": "step", "mininterval": pace} | ({} if self.world.leads else {"disable": True})
        tensorboard = report.TensorBoard(self.folder, trainer.model.tasks, trainer.epoch, self.world.leads)
        profile = StepProfile(trainer, self.folder, self.config.profile and self.world.leads)
        with closing(tensorboard), profile, tqdm(None, "train", self.config.epochs * steps, **bar) as progress:

            def advance() -> None:
                progress.update()
                profile.step()

            while trainer.epoch < self.config.epochs:
                if not trainer.train_epoch(interruption, advance):
                    self.save(LAST)
                    return False
                with record_function(PAUSE):
                    record = self._finish_epoch()
                    tensorboard.write(record)
                progress.set_postfix_str(summary_of(record))
        return True

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate, record and save the epoch just trained, in an order that a kill at any point leaves repeatable."""
        trainer, config = self.trainer, self.config
        speed = trainer.speed()
        record = {
            "epoch": trainer.epoch,
            "lr": trainer.learning_rate,
            "unsupervised_weight": trainer.unsupervised_weight if trainer.semi_supervised else 0.0,
            **trainer.epoch_means(),
            "speed": speed,
        }
        if not math.isfinite(record["total"]):
            raise UserError(f"the loss became {record['total']} in epoch {trainer.epoch}; restart with a smaller --lr")
        last = trainer.epoch == config.epochs - 1
        if last or trainer.epoch % config.val_every == config.val_every - 1:
            record["val"] = self._validate()
        trainer.next_epoch()
        if "val" in record and record["val"][GATED]["dice"] > self.best_dice:
            self.best_dice = record["val"][GATED]["dice"]
            self.save(BEST)
        if self.world.leads:
            records.append(self.folder / METRICS_FILE, record)
        if last or trainer.epoch % config.save_every == 0:
            self.save(LAST)
        return record

    def _validate(self) -> dict[str, dict[str, float]]:
        """Scores over all pixels of the validation set, of which every rank counts its images."""
        mine = self.val[self.world.rank :: self.world.size]
        counts = count_set(
            self.trainer.evaluated, mine, self._preprocessing, self.trainer.device, self.config.precision
        )
        total = {name: self.world.sum(images.sum(0, keepdim=True)) for name, images in counts.items()}
        return {name: scores._asdict() for name, scores in score_set(total).items()}

    def save(self, name: str) -> None:
        """Write a checkpoint; no rank goes on, or away, before it is on the disk."""
        state = self.trainer.state() if name == LAST else {}
        if self.world.leads:
            model = self.trainer.model if name == LAST else self.trainer.evaluated
            checkpoint.save(self.folder / name, model, self.metadata(), state)
        self.world.wait()

    @property
    def fingerprints(self) -> list[str]:
        """Of the labelled, unlabelled and validation images."""
        data = self.trainer.data
        parts = (data.labelled, data.unlabelled, self.val)
        return [NONE if part is None else part.fingerprint for part in parts]

    def metadata(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "preprocessing": self._preprocessing._asdict(),
            "data": self.fingerprints,
            "epoch": self.trainer.epoch,
            "step": self.trainer.step,
            "best_dice": self.best_dice,
        }

    def report(self) -> None:
        """Draw the pictures and print what came out."""
        path = self.folder / METRICS_FILE
        kept = records.read(path)
        report.draw_overlays(
            self.trainer.evaluated, self.val, self._preprocessing, self.trainer.device, self.folder / "overlays.png"
        )
        if any("val" in record for record in kept):
            report.draw_curves(kept, self.trainer.model.tasks, self.folder / "curves.png")
            print(report.summary(kept, self.folder))
        else:
            warn(f"{path}: holds no record of a validation any more; curves.png and the table of scores are left out")
        if self.config.ema is not None:
            print("validation is of the average weights (--ema), as in best.safetensors; last.safetensors has the last")

    @property
    def _preprocessing(self) -> Preprocessing:
        return self.trainer.data.preprocessing


def cache_folder(config: TrainConfig) -> Path:
    """Where decoded images are kept: beside the run folder, so that the runs next to each other share it."""
    run = config.resume or config.out
    return (RUNS if run is None else run.resolve().parent) / "cache"


def new_folder(config: TrainConfig, lock: FolderLock) -> Path:
    """Create and lock the run folder, --out or runs/NAME-DATE-TIME, and write the configuration into it."""
    folder = _create_folder(config)
    lock.take(folder)
    if config.out is not None:
        refuse_used(folder)  # another process may have filled it while this one read its images
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    checkpoint.write_atomically(folder / CONFIG_FILE, lambda part: part.write_text(text))
    return folder


def refuse_used(folder: Path) -> None:
    """Raise UserError where --out is a file, or a folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --out")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        remedy = f", or --resume {folder} to continue its run" if (folder / CONFIG_FILE).exists() else ""
        raise UserError(f"{folder} is not empty; give another --out{remedy}")


def _create_folder(config: TrainConfig) -> Path:
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        return config.out
    name = "synthetic" if config.data is None else config.data.resolve().name
    stem = RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in itertools.count(1):
        folder = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run started within the same second
            continue
        break
    return folder


def without_place(value: Any) -> Any:
    """A stored configuration without what a resumed run may change."""
    return {k: v for k, v in value.items() if k not in PLACE} if isinstance(value, dict) else value


def summary_of(record: dict[str, Any]) -> str:
    text = f"loss {record['total']:.3f}"
    return text + (f", val Dice {record['val'][GATED]['dice']:.4f}" if "val" in record else "")


if __name__ == "__main__":
    run_command(main)
