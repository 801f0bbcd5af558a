"""A run: trains, validates, records and saves its epochs in a run folder, and resumes from it."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from tqdm import tqdm

from .. import checkpoint
from ..checkpoint import REMEDY, Preprocessing
from ..device import untuned
from ..errors import UserError, one_line, warn
from ..evaluation.scoring import count_set, score_set
from ..files import write_atomically
from ..inference.predictor import GATED
from ..validation import check_types
from . import divergence, records, report
from .batches import TrainingData
from .config import CONFIG_FILE, MUTABLE, NONE, TrainConfig
from .distributed import World
from .health import Health, expert_health, warn_of_dead_experts
from .interruption import Interruption
from .lock import FolderLock
from .profile import PAUSE, StepProfile
from .run_folder import BEST, LAST, METRICS_FILE, OVERLAYS, new_folder
from .sources import Part
from .state import StateMismatch, states_of_ranks
from .trainer import Trainer


@dataclass
class Run:
    """A run folder, and the trainer whose results it stores."""

    config: TrainConfig
    folder: Path
    trainer: Trainer
    val: Part
    world: World
    best_dice: float = -1.0
    health: Health | None = None  # of the last validated epoch since the start of this process

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        data: TrainingData,
        val: Part,
        device: torch.device,
        world: World,
        lock: FolderLock,
    ) -> Run:
        """Start a run in a new folder, and lock the folder."""
        trainer = Trainer(config, data, device, world)
        folder = Path(world.broadcast(lambda: str(new_folder(config, lock))))
        return cls(config, folder, trainer, val, world)

    @classmethod
    def resume(cls, config: TrainConfig, data: TrainingData, val: Part, device: torch.device, world: World) -> Run:
        """Resume the run of --resume, whose folder is already locked, from its last checkpoint.

        Raises UserError if the checkpoint is damaged or belongs to another configuration or other images.
        """
        run = cls(config, config.resume, Trainer(config, data, device, world), val, world)
        path = run.folder / LAST
        if not path.is_file():
            run._require_unsaved()
            return run  # killed before its first checkpoint: start over with the same seed
        metadata, tensors = checkpoint.read(path)
        expected = run.metadata()
        if lasting(metadata.get("config")) != lasting(expected["config"]):
            raise UserError(f"{path}: is of another configuration than {run.folder / CONFIG_FILE}; start a new run")
        if metadata.get("data") != expected["data"]:
            raise UserError(
                f"{path}: the images are not those of the checkpoint; restore them, give their folder as --data, or "
                "start a new run"
            )
        check_types(path, "its metadata", metadata, {"epoch": int, "step": int, "best_dice": float}, REMEDY)
        epoch, step = metadata["epoch"], metadata["step"]
        if not (0 <= epoch <= config.epochs and 0 <= step <= run.trainer.steps_per_epoch):
            raise UserError(f"{path}: is of epoch {epoch}, step {step}, which this run does not have; {REMEDY}")
        try:
            run.trainer.restore(tensors, epoch, step)
        except StateMismatch as error:
            raise UserError(f"{path}: its tensors are not those of this run ({error}); {REMEDY}") from error
        if (before := len(states_of_ranks(tensors))) != world.size and world.is_main:
            line = f"{path}: saved by {before} processes, resumed by {world.size}: dropout draws other random numbers"
            print(one_line(line))
        run.best_dice = metadata["best_dice"]
        return run

    def _require_unsaved(self) -> None:
        """Raise UserError if a run without a checkpoint once had one: to start over would replace what it left."""
        path = self.folder / METRICS_FILE
        epochs = records.read(path)[-1:] if path.is_file() else []
        ended = (self.folder / OVERLAYS).exists()  # the report is written after the last checkpoint
        if epochs and (ended or epochs[0]["epoch"] >= self.config.save_every):  # recorded after the first checkpoint
            raise UserError(
                f"{self.folder / LAST} is missing, but {epochs[0]['epoch'] + 1} epochs were trained: restore it, or "
                "start a new run"
            )

    def train(self, interruption: Interruption) -> bool:
        """Train to the last epoch; if interrupted, save a checkpoint and return False."""
        trainer, steps = self.trainer, self.trainer.steps_per_epoch
        if self.world.is_main:
            records.truncate(self.folder / METRICS_FILE, trainer.epoch)
        done = trainer.epoch * steps + trainer.step
        pace = 0.1 if sys.stderr.isatty() else 30  # seconds between updates of the bar; each is a line in a log file
        bar = {"initial": done, "unit": "step", "mininterval": pace} | ({} if self.world.is_main else {"disable": True})
        tensorboard = report.TensorBoard(self.folder, trainer.model.tasks, trainer.epoch, self.world.is_main)
        profile = StepProfile(trainer, self.folder, self.config.profile and self.world.is_main)
        with closing(tensorboard), profile, tqdm(None, "train", self.config.epochs * steps, **bar) as progress:

            def advance() -> None:
                progress.update()
                profile.step()

            while trainer.epoch < self.config.epochs:
                if not trainer.train_epoch(interruption, advance):
                    self._require_finite(trainer.epoch_means())
                    self.save(LAST)
                    return False
                with record_function(PAUSE):
                    record = self._finish_epoch()
                    tensorboard.write(record)
                progress.set_postfix_str(summary_of(record))
        return True

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate, record and save the epoch; in this order, a run killed at any point resumes bitwise."""
        trainer, config = self.trainer, self.config
        speed, losses = trainer.speed(), trainer.epoch_means()
        self._require_finite(losses)
        record = {
            "epoch": trainer.epoch,
            "lr": trainer.learning_rate,
            "unsupervised_weight": trainer.unsupervised_weight if trainer.semi_supervised else 0.0,
            **losses,
            "speed": speed,
        }
        last = trainer.epoch == config.epochs - 1
        if last or trainer.epoch % config.val_every == config.val_every - 1:
            with untuned():
                record["val"] = self._validate()
                record["health"] = self._examine_experts()._asdict()
        trainer.next_epoch()
        if "val" in record and record["val"][GATED]["dice"] > self.best_dice:
            self.best_dice = record["val"][GATED]["dice"]
            self.save(BEST)
        if self.world.is_main:
            records.append(self.folder / METRICS_FILE, record)
        if last or trainer.epoch % config.save_every == 0:
            self.save(LAST)
        return record

    def _require_finite(self, losses: dict[str, Any]) -> None:
        divergence.require_finite(losses, self.trainer.model.state_dict(), self.trainer.epoch, self.folder)

    def _validate(self) -> dict[str, dict[str, float]]:
        """Scores over all pixels of the validation set; each rank counts a part of the images."""
        mine = self.val[self.world.rank :: self.world.size]
        trainer = self.trainer
        try:
            counts = count_set(trainer.eval_model, mine, self._preprocessing, trainer.device, self.config.precision)
        except FloatingPointError as error:
            divergence.stop(f"{error}", trainer.epoch, divergence.OF_STEPS, self.folder)
        total = {name: self.world.sum(images.sum(0, keepdim=True)) for name, images in counts.items()}
        return {name: scores._asdict() for name, scores in score_set(total).items()}

    def _examine_experts(self) -> Health:
        """The health of the experts on labeled images; a warning if one has died since the last call."""
        trainer, before = self.trainer, self.health
        labeled, precision = trainer.data.labeled, self.config.precision
        self.health = expert_health(trainer.eval_model, labeled, self._preprocessing, trainer.device, precision)
        if self.world.is_main:
            warn_of_dead_experts(trainer.model.expert_tasks, self.health, before, trainer.epoch, self.folder)
        return self.health

    def save(self, name: str) -> None:
        """Write a checkpoint; all ranks return after it is on the disk."""
        state = self.trainer.state() if name == LAST else {}
        if self.world.is_main:
            model = self.trainer.model if name == LAST else self.trainer.eval_model
            checkpoint.save(self.folder / name, model, self.metadata(), state)
        self.world.wait()

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of the labeled, unlabeled and validation images; "none" for a missing part."""
        data = self.trainer.data
        parts = (data.labeled, data.unlabeled, self.val)
        return [NONE if part is None else part.fingerprint for part in parts]

    def metadata(self) -> dict[str, Any]:
        """The JSON metadata of a checkpoint."""
        return {
            "config": self.config.to_dict(),
            "preprocessing": self._preprocessing._asdict(),
            "data": self.fingerprints,
            "epoch": self.trainer.epoch,
            "step": self.trainer.step,
            "best_dice": self.best_dice,
        }

    def report(self) -> None:
        """Draw curves.png and overlays.png, and print the scores."""
        path = self.folder / METRICS_FILE
        kept = records.read(path)
        overlays = (self.trainer.eval_model, self.val, self._preprocessing, self.trainer.device)
        write_atomically(self.folder / OVERLAYS, lambda part: report.draw_overlays(*overlays, part))
        if any("val" in record for record in kept):
            curves = (kept, self.trainer.model.tasks)
            write_atomically(self.folder / "curves.png", lambda part: report.draw_curves(*curves, part))
            print(report.summary(kept, self.folder))
        else:
            warn(f"{path}: holds no record of a validation; curves.png and the table of scores are left out")
        if self.config.ema is not None:
            print("scores and best.safetensors are of the EMA (--ema); last.safetensors has the last weights")

    @property
    def _preprocessing(self) -> Preprocessing:
        return self.trainer.data.preprocessing


def lasting(value: Any) -> Any:
    """The options of a stored configuration that a resumed run may not change."""
    return {k: v for k, v in value.items() if k not in MUTABLE} if isinstance(value, dict) else value


def summary_of(record: dict[str, Any]) -> str:
    text = f"loss {record['total']:.3f}"
    return text + (f", val Dice {record['val'][GATED]['dice']:.4f}" if "val" in record else "")
