"""The training loop's inside: the data sets of a run, one step, one epoch, and the state that resumes it bitwise.

Randomness is of two kinds. Order and augmentation come from generators keyed by (seed, epoch, step), so that they need
not be saved; dropout draws from torch's global generators, which are saved with the state. Among several processes all
draw the same order and augmentation of the global batch, of which each takes its rows; dropout differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from . import augment
from . import functional as F
from .checkpoint import Preprocessing
from .config import TrainConfig
from .data import Dataset
from .device import autocast
from .distributed import World
from .model import AdaptiveMultiObjectiveLoss, SemiMoE
from .objective import Objective, StepLosses
from .schedule import epoch_order, generator, learning_rate, unsupervised_weight

Batch = tuple[tuple[Tensor, Tensor], Tensor | None]  # labelled images and masks, unlabelled images

ORDER, LABELLED, UNLABELLED = range(3)  # streams of random numbers


@dataclass(frozen=True)
class TrainingData:
    labelled: Dataset
    unlabelled: Dataset | None
    preprocessing: Preprocessing


class Trainer:
    """Model, optimisers and position in the schedule; `train_epoch` advances them, `state`/`restore` save them.

    device: where everything lives; the images of both training sets are moved there once, as uint8.
    world: the processes that share each batch; `state`, `restore` and the end of an epoch are for all of them at once.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, device: torch.device, world: World | None = None
    ) -> None:
        self.config, self.data, self.device, self.world = config, data, device, world or World()
        torch.manual_seed(config.seed)
        self.model = SemiMoE(width=config.width).to(device, memory_format=torch.channels_last)
        if config.sync_bn:
            self.model = self.world.synchronize_batch_norm(self.model, device)
        for gate in self.model.gating.gates:
            gate.dropout.p = config.dropout
        self.adaptive = AdaptiveMultiObjectiveLoss(config.coefficients, config.regularizer, config.initial_log_var).to(
            device
        )
        self.sgd = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.adam = torch.optim.Adam(self.adaptive.parameters(), config.log_var_lr, weight_decay=config.weight_decay)
        self.objective = self.world.parallel(Objective(self.model, self.adaptive))
        if self.world.rank > 0:  # other rows, other dropout; rank 0 goes on as a process alone would
            torch.manual_seed(generator(config.seed, self.world.rank).initial_seed())
        self.labelled = tuple(t.to(device) for t in (data.labelled.images, data.labelled.masks))
        self.unlabelled = None if data.unlabelled is None else data.unlabelled.images.to(device)
        self.epoch = 0
        self.step = 0  # within the epoch
        self.sums = self._zero_sums()
        if self.world.size > 1:
            self._settle()

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
        for labelled, unlabelled in _timed(self._batches()):
            losses = self.train_step(labelled, unlabelled)
            self._add(losses)
            self.step += 1
            progress()
            if stop():
                return False
        if self.world.size > 1:
            for buffer in self._running_statistics().values():
                buffer.copy_(self.world.mean(buffer))
        return True

    def train_step(self, labelled: tuple[Tensor, Tensor], unlabelled: Tensor | None) -> StepLosses:
        """One optimiser step on normalised images (B, 3, H, W), their masks (B, H, W), and unlabelled images."""
        self.sgd.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        losses = self._losses(labelled, unlabelled)
        losses.total.backward()
        self.sgd.step()
        self.adam.step()
        return losses

    def _losses(self, labelled: tuple[Tensor, Tensor], unlabelled: Tensor | None) -> StepLosses:
        images, masks = labelled
        with record_function("targets"):
            targets = (masks, *F.distance_targets(masks, self.config.ring_radius))
        with autocast(self.config.precision, self.device):
            return self.objective(images, targets, unlabelled, self.unsupervised_weight)

    def _settle(self) -> None:
        """Let DDP see one backward pass, after which it packs the gradients anew for good, and undo all else it does.

        How they are packed decides on the order in which more than two ranks are summed, and so on the last bits: a
        resumed run must pack from its first step as the undisturbed one did.
        """
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._losses(*next(self._batches())).total.backward()
        self.model.load_state_dict(before, strict=False)

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, self._zero_sums()

    def epoch_means(self) -> dict[str, Any]:
        """Means over the steps of the epoch so far, as plain numbers; the one place that waits for the device."""
        means = {name: (self.world.mean(total) / max(self.step, 1)).tolist() for name, total in self.sums.items()}
        return means | {"loss_weights": torch.exp(-self.adaptive.log_vars.detach()).tolist()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor beside the model that the next step depends on."""
        state = {f"adaptive.{key}": value for key, value in self.adaptive.state_dict().items()}
        for name, parameter, optimiser in self._optimised():
            moments = optimiser.state[parameter].items()
            state |= {f"optim.{name}.{key}": value for key, value in moments if value is not None}
        for key, value in self._own_state().items():
            for rank, part in enumerate(self.world.gather(value)):
                state[f"rank{rank}.{key}" if rank else key] = part
        return state

    def restore(self, state: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Take up the run where a checkpoint left it: the tensors of `state`, and the model's under `model.`.

        Where it was left by another number of processes, their sums and statistics are averaged, and ranks above 0
        start their dropout anew.
        """
        self.model.load_state_dict(with_prefix(state, "model."))
        self.adaptive.load_state_dict(with_prefix(state, "adaptive."))
        for name, parameter, optimiser in self._optimised():
            moments = with_prefix(state, f"optim.{name}.")
            optimiser.state[parameter] = {key: _like(parameter, value) for key, value in moments.items()}
        ranks = states_of_ranks(state)
        same = len(ranks) == self.world.size
        own = ranks[self.world.rank if same else 0]
        tensors = {f"sums.{name}": total for name, total in self.sums.items()}
        tensors |= {f"statistics.{name}": buffer for name, buffer in self._running_statistics().items()}
        for key, tensor in tensors.items():
            if key in own:
                tensor.copy_(own[key] if same else torch.stack([rank[key] for rank in ranks]).mean(0))
        if same or self.world.leads:
            torch.set_rng_state(own["random.cpu"].cpu())
            if self.device.type == "cuda" and "random.cuda" in own:
                torch.cuda.set_rng_state(own["random.cuda"].cpu(), self.device)
        self.epoch, self.step = epoch, step

    def _own_state(self) -> dict[str, Tensor]:
        """What the processes of a run do not have in common."""
        own = {f"sums.{name}": value for name, value in self.sums.items()}
        own["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            own["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.world.size > 1:
            own |= {f"statistics.{name}": value for name, value in self._running_statistics().items()}
        return own

    def _running_statistics(self) -> dict[str, Tensor]:
        """Running means and variances of BN: each process has those of its own rows until the epoch ends."""
        return {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}

    def _batches(self) -> Iterator[Batch]:
        """The augmented batches of the epoch's remaining steps."""
        c, steps = self.config, self.steps_per_epoch
        random = generator(c.seed, self.epoch, ORDER)
        labelled = epoch_order(len(self.data.labelled), steps * c.labeled_batch, random).to(self.device)
        unlabelled = None
        if self.unlabelled is not None:
            unlabelled = epoch_order(len(self.unlabelled), steps * c.unlabeled_batch, random).to(self.device)
        for step in range(self.step, steps):
            rows = labelled[step * c.labeled_batch : (step + 1) * c.labeled_batch]
            images, masks = self._augmented(LABELLED, step, rows, *self.labelled)
            others = None
            if unlabelled is not None:
                rows = unlabelled[step * c.unlabeled_batch : (step + 1) * c.unlabeled_batch]
                others, _ = self._augmented(UNLABELLED, step, rows, self.unlabelled)
            yield (images, masks), others

    @record_function("augmentation")
    def _augmented(
        self, stream: int, step: int, rows: Tensor, images: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """This process's share of the global batch that the rows of the data set make up, augmented."""
        random = generator(self.config.seed, self.epoch, stream, step)
        share = self.world.share(len(rows))
        parameters = augment.draw(len(rows), self.config.image_size, random)[share]
        rows = rows[share]
        masks = None if masks is None else masks[rows]
        preprocessing = self.data.preprocessing
        images, masks = augment.apply(images[rows], masks, parameters, preprocessing.mean, preprocessing.std)
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


def _timed(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, with the time until each is there marked for a profiler."""
    while True:
        with record_function("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment on the device and in the layout of its parameter; a step counter stays on the CPU, as Adam keeps it."""
    return value.cpu() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def states_of_ranks(state: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """What each of the processes that left a state had of its own, under the names that rank 0's has in it."""
    ranks = [state]
    while rank := with_prefix(state, f"rank{len(ranks)}."):
        ranks.append(rank)
    return ranks


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
