"""The training loop's inside: one step, one epoch, and the state that resumes it bitwise.

Dropout draws from torch's global generators, which are saved with the state; all other randomness is keyed by epoch and
step (`batches`). A step reads its batch and updates everything else in place, without waiting for the device, so that
it can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from .. import functional as F
from ..data import augment
from ..device import autocast
from ..model import AdaptiveMultiObjectiveLoss, SemiMoE
from ..objective import Objective, StepLosses
from .batches import Batch, Batches, Images, TrainingData
from .config import TrainConfig
from .distributed import World
from .ema import EMA
from .graphs import WARM_UP, GraphedStep, compile_experts
from .schedule import generator, learning_rate, unsupervised_weight
from .speed import Stopwatch, flops_per_step, peak_memory_bytes

T = TypeVar("T")


class Trainer:
    """Model, optimizers and position in the schedule; `train_epoch` advances them, `state`/`restore` save them.

    device: where everything lives; world: the processes that share each batch; `state`, `restore` and the end of an
    epoch are for all of them at once.
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
        self.average = None if config.ema is None else EMA(self.model, config.ema)
        compile_experts(self.model.experts, config.compile)
        self.adaptive = AdaptiveMultiObjectiveLoss(config.coefficients, config.regularizer, config.initial_log_var).to(
            device
        )
        self._optimizers()
        self.objective = self.world.parallel(Objective(self.model, self.adaptive, config.joint_forward))
        if self.world.rank > 0:  # other rows, other dropout; rank 0 goes on as a process alone would
            torch.manual_seed(generator(config.seed, self.world.rank).initial_seed())
        self.batches = Batches(config, data, device, self.world)
        self.mean, self.std = (torch.tensor(values, device=device) for values in data.preprocessing[1:3])
        self.weight = torch.zeros((), device=device)  # u of the epoch under way
        self.epoch = 0
        self.step = 0  # within the epoch
        self.sums = self._zero_sums()
        graphed = config.cuda_graph and not config.profile and device.type == "cuda" and self.world.size == 1
        self.update = GraphedStep(self._update, device) if graphed else self._update
        self.stopwatch = Stopwatch(device, WARM_UP + 1 if graphed else 1)
        self.flops = flops_per_step(config.width, config.image_size, self.images_per_step)
        if self.world.size > 1:
            self._settle()

    def _optimizers(self) -> None:
        """One SGD over the networks, one Adam over s. Fused: one or a few kernels for all parameters together.

        The learning rate is a tensor, so that a captured step follows the schedule.
        """
        c, capturable = self.config, self.device.type == "cuda"
        self.lr = torch.zeros((), device=self.device)
        self.sgd = torch.optim.SGD(
            self.model.parameters(), self.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True
        )
        self.adam = torch.optim.Adam(
            self.adaptive.parameters(), c.log_var_lr, weight_decay=c.weight_decay, fused=True, capturable=capturable
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        c, base = self.config, self.config.lr
        if c.scale_lr:  # linear in the images of a step (arXiv 1706.02677), from those of the published recipe
            base *= self.images_per_step / (4 if self.semi_supervised else 2)
        return learning_rate(self.epoch, base, c.warmup_epochs, c.decay_epochs, c.decay)

    @property
    def unsupervised_weight(self) -> float:
        return unsupervised_weight(self.epoch, self.config.epochs, self.config.unsupervised_weight)

    @property
    def images_per_step(self) -> int:
        return self.config.labeled_batch + (self.config.unlabeled_batch if self.semi_supervised else 0)

    @property
    def semi_supervised(self) -> bool:
        return self.data.unlabeled is not None

    @property
    def settings(self) -> str:
        """How the steps are executed, in words."""
        compiled = "" if self.config.compile == "none" else ", U-Nets compiled, which takes the first a minute or more"
        step = "one CUDA graph" if isinstance(self.update, GraphedStep) else "eager"
        unlabeled = 0 if self.data.unlabeled is None else len(self.data.unlabeled)
        images = f"{len(self.data.labeled)} labeled and {unlabeled} unlabeled images on the {self.batches.data_device}"
        return f"{images}; steps: {step}{compiled}"

    def speed(self) -> dict[str, float | None]:
        """Of the steps of the epoch just trained, and the time that the warm-up took before them.

        images_per_second and tflop_per_second are None where the epoch had no step after the warm-up.
        """
        seconds = self.stopwatch.seconds_per_step()
        return {
            "images_per_second": None if seconds is None else self.images_per_step / seconds,
            "tflop_per_second": None if seconds is None else self.flops / seconds / 1e12,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "warm_up_seconds": self.stopwatch.warm_up_seconds,
        }

    @property
    def evaluated(self) -> SemiMoE:
        """The model to evaluate: that of the average weights, where they are kept."""
        return self.model if self.average is None else self.average.after(self.epoch * self.steps_per_epoch + self.step)

    def train_epoch(self, stop: Callable[[], bool], progress: Callable[[], None]) -> bool:
        """Train the rest of the current epoch; False if `stop()` was true after some step."""
        batches = self.begin_epoch()
        self.stopwatch.start()
        for batch in _timed("data", batches):
            self.train_step(batch)
            self.step += 1
            self.stopwatch.tick()
            progress()
            if stop():
                return False
        self.stopwatch.stop()
        if self.world.size > 1:
            for buffer in self._running_statistics().values():
                buffer.copy_(self.world.mean(buffer))
        return True

    def begin_epoch(self) -> Iterator[Batch]:
        """Set the model and the schedule to the current epoch, and give the batches of its remaining steps."""
        self.model.train()
        self.lr.fill_(self.learning_rate)
        self.weight.fill_(self.unsupervised_weight)
        return self.batches.of_epoch(self.epoch, self.step)

    def train_step(self, batch: Batch) -> None:
        """One optimizer step. Its losses go to `sums`; nothing waits for the device."""
        self.update(batch)

    def _update(self, batch: Batch) -> None:
        self.sgd.zero_grad()
        self.adam.zero_grad()
        parts = batch.parts(self.config.accumulate)
        for number, part in enumerate(parts, 1):
            with self._gradients_reduced(number == len(parts)):
                losses = self._losses(part)
                (losses.total / len(parts)).backward()
            for name, total in self.sums.items():
                total += getattr(losses, name).detach() / len(parts)
        self.sgd.step()
        self.adam.step()
        if self.average is not None:
            self.average.update()

    def _gradients_reduced(self, last: bool) -> AbstractContextManager[Any]:
        """Among several processes, gradients are summed over them with the last part of a batch only."""
        return self.objective.no_sync() if self.world.size > 1 and not last else nullcontext()

    def _losses(self, batch: Batch) -> StepLosses:
        images, masks = self._augmented(batch.labeled)
        with record_function("targets"):
            targets = (masks, *F.distance_targets(masks, self.config.ring_radius))
        unlabeled = None if batch.unlabeled is None else self._augmented(batch.unlabeled)[0]
        with autocast(self.config.precision, self.device):
            return self.objective(images, targets, unlabeled, self.weight)

    def _augmented(self, batch: Images) -> tuple[Tensor, Tensor | None]:
        with record_function("augmentation"):
            images, masks = augment.apply(*batch, self.mean, self.std)
            return images.contiguous(memory_format=torch.channels_last), masks

    def _settle(self) -> None:
        """Let DDP see one backward pass, after which it packs the gradients anew for good, and undo all else it does.

        How they are packed decides on the order in which more than two ranks are summed, and so on the last bits: a
        resumed run must pack from its first step as the undisturbed one did.
        """
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._losses(next(self.batches.of_epoch(0)).parts(self.config.accumulate)[0]).total.backward()
        self.model.load_state_dict(before, strict=False)

    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        for total in self.sums.values():
            total.zero_()

    def epoch_means(self) -> dict[str, Any]:
        """Means over the steps of the epoch so far, as plain numbers; the one place that waits for the device."""
        means = {name: (self.world.mean(total) / max(self.step, 1)).tolist() for name, total in self.sums.items()}
        return means | {"loss_weights": torch.exp(-self.adaptive.log_vars.detach()).tolist()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor beside the model that the next step depends on."""
        state = {f"adaptive.{key}": value for key, value in self.adaptive.state_dict().items()}
        if self.average is not None:
            state |= {f"average.{key}": value for key, value in self.average.sums.items()}
        for name, parameter, optimizer in self._optimized():
            moments = optimizer.state[parameter].items()
            state |= {f"optim.{name}.{key}": value for key, value in moments if value is not None}
        for key, value in self._own_state().items():
            for rank, part in enumerate(self.world.gather(value)):
                state[f"rank{rank}.{key}" if rank else key] = part
        return state

    def restore(self, state: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Take up the run where a checkpoint left it: the tensors of `state`, and the model's under `model.`.

        Where it was left by another number of processes, their sums and statistics are averaged, and ranks above 0
        start their dropout anew. Raises KeyError or RuntimeError for tensors that are not those of this run.
        """
        self.model.load_state_dict(with_prefix(state, "model."))
        self.adaptive.load_state_dict(with_prefix(state, "adaptive."))
        if self.average is not None:
            for name, value in with_prefix(state, "average.").items():
                self.average.sums[name].copy_(value)
        for name, parameter, optimizer in self._optimized():
            moments = with_prefix(state, f"optim.{name}.")
            if moments.keys() != self._moments(optimizer):
                raise KeyError(f"optim.{name}")
            optimizer.state[parameter] = {key: _like(parameter, value) for key, value in moments.items()}
        ranks = states_of_ranks(state)
        same = len(ranks) == self.world.size
        own = ranks[self.world.rank if same else 0]
        tensors = {f"sums.{name}": total for name, total in self.sums.items()}
        tensors |= {f"statistics.{name}": buffer for name, buffer in self._running_statistics().items()}
        for key, tensor in tensors.items():
            if key in own:
                tensor.copy_(own[key] if same else torch.stack([rank[key] for rank in ranks]).mean(0))
        if same or self.world.is_main:
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
        statistics = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        if self.average is not None:
            statistics |= {f"average.{name}": self.average.sums[name] for name in statistics}
        return statistics

    def _optimized(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter, self.sgd
        for name, parameter in self.adaptive.named_parameters():
            yield f"adaptive.{name}", parameter, self.adam

    def _moments(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """What an optimizer keeps for each parameter once it has taken a step."""
        if optimizer is self.adam:
            return {"step", "exp_avg", "exp_avg_sq"}
        return {"momentum_buffer"} if self.config.momentum else set()

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


def _timed(name: str, items: Iterator[T]) -> Iterator[T]:
    """The items; a profile shows under `name` the time that each was waited for."""
    while True:
        with record_function(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment, or a count of steps, on the device and in the layout of its parameter."""
    return value.to(parameter.device) if value.ndim == 0 else torch.empty_like(parameter).copy_(value)


def states_of_ranks(state: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """What each of the processes that left a state had of its own, under the names that rank 0's has in it."""
    ranks = [state]
    while rank := with_prefix(state, f"rank{len(ranks)}."):
        ranks.append(rank)
    return ranks


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
