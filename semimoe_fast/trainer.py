"""The training loop's inside: the data sets of a run, one step, one epoch, and the state that resumes it bitwise.

Randomness is of two kinds. Order and augmentation come from generators keyed by (seed, epoch, step), so that they need
not be saved; dropout draws from torch's global generators, which are saved with the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import augment
from . import functional as F
from .checkpoint import Preprocessing
from .config import TrainConfig
from .data import Dataset
from .device import autocast
from .model import AdaptiveMultiObjectiveLoss, SemiMoE
from .objective import StepLosses, objective
from .schedule import epoch_order, generator, learning_rate, unsupervised_weight

ORDER, LABELLED, UNLABELLED = range(3)  # streams of random numbers


@dataclass(frozen=True)
class TrainingData:
    labelled: Dataset
    unlabelled: Dataset | None
    preprocessing: Preprocessing


class Trainer:
    """Model, optimisers and position in the schedule; `train_epoch` advances them, `state`/`restore` save them.

    device: where everything lives; the images of both training sets are moved there once, as uint8.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        torch.manual_seed(config.seed)
        self.model = SemiMoE(width=config.width).to(device, memory_format=torch.channels_last)
        for gate in self.model.gating.gates:
            gate.dropout.p = config.dropout
        self.adaptive = AdaptiveMultiObjectiveLoss(config.coefficients, config.regularizer, config.initial_log_var).to(
            device
        )
        self.sgd = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.adam = torch.optim.Adam(self.adaptive.parameters(), config.log_var_lr, weight_decay=config.weight_decay)
        self.labelled = tuple(t.to(device) for t in (data.labelled.images, data.labelled.masks))
        self.unlabelled = None if data.unlabelled is None else data.unlabelled.images.to(device)
        self.epoch = 0
        self.step = 0  # within the epoch
        self.sums = self._zero_sums()

    @property
    def steps_per_epoch(self) -> int:
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        if self.unlabelled is not None:
            return len(self.unlabelled) // self.config.unlabeled_batch
        return -(-len(self.data.labelled) // self.config.labeled_batch)

    @property
    def learning_rate(self) -> float:
        c = self.config
        return learning_rate(self.epoch, c.lr, c.warmup_epochs, c.decay_epochs, c.decay)

    @property
    def unsupervised_weight(self) -> float:
        return unsupervised_weight(self.epoch, self.config.epochs, self.config.unsupervised_weight)

    @property
    def images_per_step(self) -> int:
        return self.config.labeled_batch + (self.config.unlabeled_batch if self.unlabelled is not None else 0)

    def train_epoch(self, stop: Callable[[], bool], progress: Callable[[], None]) -> bool:
        """Train the rest of the current epoch; False if `stop()` was true after some step."""
        self.model.train()
        for group in self.sgd.param_groups:
            group["lr"] = self.learning_rate
        for labelled, unlabelled in self._batches():
            losses = self.train_step(labelled, unlabelled)
            self._add(losses)
            self.step += 1
            progress()
            if stop():
                return False
        return True

    def train_step(self, labelled: tuple[Tensor, Tensor], unlabelled: Tensor | None) -> StepLosses:
        """One optimiser step on normalised images (B, 3, H, W), their masks (B, H, W), and unlabelled images."""
        images, masks = labelled
        targets = (masks, *F.distance_targets(masks, self.config.ring_radius))
        self.sgd.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        with autocast(self.config.precision, self.device):
            losses = objective(self.model, self.adaptive, images, targets, unlabelled, self.unsupervised_weight)
        losses.total.backward()
        self.sgd.step()
        self.adam.step()
        return losses

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, self._zero_sums()

    def epoch_means(self) -> dict[str, Any]:
        """Means over the steps of the epoch so far, as plain numbers; the one place that waits for the device."""
        means = {name: (total / max(self.step, 1)).tolist() for name, total in self.sums.items()}
        return means | {"loss_weights": torch.exp(-self.adaptive.log_vars.detach()).tolist()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor beside the model that the next step depends on."""
        state = {f"adaptive.{key}": value for key, value in self.adaptive.state_dict().items()}
        for name, parameter, optimiser in self._optimised():
            moments = optimiser.state[parameter].items()
            state |= {f"optim.{name}.{key}": value for key, value in moments if value is not None}
        state |= {f"sums.{name}": value for name, value in self.sums.items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Take up the run where a checkpoint left it: the tensors of `state`, and the model's under `model.`."""
        self.model.load_state_dict(with_prefix(state, "model."))
        self.adaptive.load_state_dict(with_prefix(state, "adaptive."))
        for name, parameter, optimiser in self._optimised():
            moments = with_prefix(state, f"optim.{name}.")
            optimiser.state[parameter] = {key: _like(parameter, value) for key, value in moments.items()}
        self.sums = {name: state[f"sums.{name}"].to(self.device) for name in self.sums}
        torch.set_rng_state(state["random.cpu"].cpu())
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"].cpu(), self.device)
        self.epoch, self.step = epoch, step

    def _batches(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor | None]]:
        """The augmented batches of the epoch's remaining steps."""
        c, steps = self.config, self.steps_per_epoch
        random = generator(c.seed, self.epoch, ORDER)
        labelled = epoch_order(len(self.data.labelled), steps * c.labeled_batch, random).to(self.device)
        unlabelled = None
        if self.unlabelled is not None:
            unlabelled = epoch_order(len(self.unlabelled), steps * c.unlabeled_batch, random).to(self.device)
        for step in range(self.step, steps):
            rows = labelled[step * c.labeled_batch : (step + 1) * c.labeled_batch]
            images, masks = self._augmented(LABELLED, step, self.labelled[0][rows], self.labelled[1][rows])
            others = None
            if unlabelled is not None:
                rows = unlabelled[step * c.unlabeled_batch : (step + 1) * c.unlabeled_batch]
                others, _ = self._augmented(UNLABELLED, step, self.unlabelled[rows], None)
            yield (images, masks), others

    def _augmented(self, stream: int, step: int, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        random = generator(self.config.seed, self.epoch, stream, step)
        parameters = augment.draw(len(images), self.config.image_size, random)
        preprocessing = self.data.preprocessing
        images, masks = augment.apply(images, masks, parameters, preprocessing.mean, preprocessing.std)
        return images.contiguous(memory_format=torch.channels_last), masks

    def _optimised(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter, self.sgd
        for name, parameter in self.adaptive.named_parameters():
            yield f"adaptive.{name}", parameter, self.adam

    def _zero_sums(self) -> dict[str, Tensor]:
        objectives, gates = self.adaptive.log_vars.shape, (len(self.model.tasks), len(self.model.experts))
        shapes = {
            "total": (),
            "supervised_total": (),
            "unsupervised_total": (),
            "supervised_terms": objectives,
            "unsupervised_terms": objectives,
            "gate_weights": gates,
        }
        return {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}

    def _add(self, losses: StepLosses) -> None:
        for name, total in self.sums.items():
            total += getattr(losses, name).detach()


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment on the device and in the layout of its parameter; a step counter stays on the CPU, as Adam keeps it."""
    return value.cpu() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
