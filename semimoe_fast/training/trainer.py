"""One training step, one epoch, and the state that resumes a run bitwise.

Dropout draws from torch's global generators, whose states are part of the saved state. All other random numbers depend
on seed, epoch and step only (`batches`). A step reads its batch, updates everything else in place and does not
synchronize the device, so that a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from .. import functional as F
from ..data import appearance, augment
from ..device import autocast
from ..model import AdaptiveMultiObjectiveLoss, SemiMoE
from ..objective import Objective, StepLosses
from ..ops.recomputation import recompute
from .batches import Batch, Batches, Images, TrainingData
from .config import TrainConfig
from .distributed import World
from .ema import EMA
from .graphs import WARM_UP, GraphedStep, compile_experts
from .optimizers import network_optimizer
from .schedule import generator, learning_rate, unsupervised_weight
from .speed import Stopwatch, flops_per_step, peak_memory_bytes
from .state import check_state, like, states_of_ranks, with_prefix

T = TypeVar("T")


class Trainer:
    """Model, optimizers and schedule of a run. `train_epoch` trains; `state` and `restore` save and resume.

    device: device of all tensors. world: the processes of the run; all ranks must call `train_epoch`, `epoch_means`,
    `state` and `restore` together.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, device: torch.device, world: World | None = None
    ) -> None:
        self.config, self.data, self.device, self.world = config, data, device, world or World()
        torch.manual_seed(config.seed)
        self.model = SemiMoE(width=config.width).to(device, memory_format=torch.channels_last)
        if config.sync_bn:
            self.model = self.world.synchronize_batch_norm(self.model, device)
        self.model.gating.dropout.p = config.dropout
        self.ema = None if config.ema is None else EMA(self.model, config.ema)
        compile_experts(self.model.experts, config.compile)
        self.adaptive = AdaptiveMultiObjectiveLoss(config.coefficients, config.regularizer, config.initial_log_var).to(
            device
        )
        self._create_optimizers()
        self.objective = self.world.parallel(Objective(self.model, self.adaptive))
        if self.world.rank > 0:  # dropout differs by rank; rank 0 draws as a run of one process
            torch.manual_seed(generator(config.seed, self.world.rank).initial_seed())
        self.batches = Batches(config, data, device, self.world)
        self.mean, self.std = (torch.tensor(values, device=device) for values in data.preprocessing[1:3])
        self.weight = torch.zeros((), device=device)  # u of the current epoch
        self.epoch = 0
        self.step = 0  # steps done in the current epoch
        self.sums = self._zero_sums()
        graphed = config.cuda_graph and not config.profile and device.type == "cuda" and self.world.size == 1
        self.update = GraphedStep(self._update, device) if graphed else self._update
        self.stopwatch = Stopwatch(device, WARM_UP + 1 if graphed else 1)
        self.flops = flops_per_step(config.width, config.image_size, self.config.images_per_step)
        if self.world.size > 1:
            self._warm_up_ddp()

    def _create_optimizers(self) -> None:
        """Create one optimizer for the networks and one Adam for s, both fused: a few kernels update all parameters.

        The learning rate of the networks is a tensor, so that a CUDA graph follows the schedule.
        """
        c, capturable = self.config, self.device.type == "cuda"
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = network_optimizer(c, self.model.parameters(), self.lr)
        self.adam = torch.optim.Adam(
            self.adaptive.parameters(), c.log_var_lr, weight_decay=c.weight_decay, fused=True, capturable=capturable
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.config, self.epoch, self.config.base_lr)

    @property
    def unsupervised_weight(self) -> float:
        return unsupervised_weight(self.epoch, self.config.epochs, self.config.unsupervised_weight)

    @property
    def semi_supervised(self) -> bool:
        return self.data.unlabeled is not None

    @property
    def settings(self) -> str:
        """One line for the log: the images, where they are, and how steps run."""
        compiled = "" if self.config.compile == "none" else ", compiled U-Nets (the first step takes a minute or more)"
        step = "one CUDA graph" if isinstance(self.update, GraphedStep) else "eager"
        unlabeled = 0 if self.data.unlabeled is None else len(self.data.unlabeled)
        images = f"{len(self.data.labeled)} labeled and {unlabeled} unlabeled images on the {self.batches.data_device}"
        return f"{images}; steps: {step}{compiled}"

    def speed(self) -> dict[str, float | None]:
        """Speed of the steps of the last epoch, peak memory, and seconds of the warm-up.

        images_per_second and tflop_per_second are None if the epoch had no step after the warm-up.
        """
        seconds = self.stopwatch.seconds_per_step()
        return {
            "images_per_second": None if seconds is None else self.config.images_per_step / seconds,
            "tflop_per_second": None if seconds is None else self.flops / seconds / 1e12,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "warm_up_seconds": self.stopwatch.warm_up_seconds,
        }

    @property
    def eval_model(self) -> SemiMoE:
        """The model to evaluate: the EMA with --ema, else the model itself."""
        return self.model if self.ema is None else self.ema.after(self.epoch * self.steps_per_epoch + self.step)

    def train_epoch(self, stop: Callable[[], bool], progress: Callable[[], None]) -> bool:
        """Train the remaining steps of the current epoch; return False as soon as `stop()` is true after a step."""
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
        """Set training mode, learning rate and u for the current epoch; return the batches of its remaining steps."""
        self.model.train()
        self.lr.fill_(self.learning_rate)
        self.weight.fill_(self.unsupervised_weight)
        return self.batches.of_epoch(self.epoch, self.step)

    def train_step(self, batch: Batch) -> None:
        """One optimizer step. It adds its losses to `sums` and does not synchronize the device."""
        self.update(batch)

    def _update(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.adam.zero_grad()
        parts = batch.parts(self.config.accumulate)
        for number, part in enumerate(parts, 1):
            with self._all_reduce_if(number == len(parts)):
                losses = self._losses(part)
                (losses.total / len(parts)).backward()
            for name, total in self.sums.items():
                total += getattr(losses, name).detach() / len(parts)
        self.optimizer.step()
        self.adam.step()
        if self.ema is not None:
            self.ema.update()

    def _all_reduce_if(self, last: bool) -> AbstractContextManager[Any]:
        """A context in which DDP averages the gradients over the ranks only for the last part of a batch."""
        return self.objective.no_sync() if self.world.size > 1 and not last else nullcontext()

    def _losses(self, batch: Batch) -> StepLosses:
        images, masks = self._augmented(batch.labeled)
        targets = self._targets(masks)
        unlabeled = None if batch.unlabeled is None else self._augmented(batch.unlabeled)[0]
        with autocast(self.config.precision, self.device), recompute() if self.config.recompute else nullcontext():
            return self.objective(images, targets, unlabeled, self.weight)

    def _targets(self, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, sdf and boundary of augmented masks (B, S, S), uint8 0/1, or int32 ids with --instances."""
        instances = self.config.instances
        with record_function("targets"):
            sdf, boundary = F.distance_targets(masks, self.config.ring_radius, instances=instances)
            return (masks != 0).byte() if instances else masks, sdf, boundary

    def _augmented(self, batch: Images) -> tuple[Tensor, Tensor | None]:
        with record_function("augmentation"):
            images, masks = augment.resample(
                batch.images, batch.masks, batch.augmentation, self.config.image_size, self.config.centered_masks
            )
            if batch.appearance is not None:
                images = appearance.apply(images, batch.appearance)
            images = augment.normalize(images, self.mean, self.std)
            return images.contiguous(memory_format=torch.channels_last), masks

    def _warm_up_ddp(self) -> None:
        """Run one backward pass, then restore the BN statistics and the random state.

        DDP rebuilds its gradient buckets after the first backward pass. The buckets decide the order in which the
        gradients of more than two ranks are summed, so a resumed run needs the final buckets from its first step.
        """
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._losses(next(self.batches.of_epoch(0)).parts(self.config.accumulate)[0]).total.backward()
        self.model.load_state_dict(before, strict=False)

    def next_epoch(self) -> None:
        """Start the next epoch with sums of 0."""
        self.epoch, self.step = self.epoch + 1, 0
        for total in self.sums.values():
            total.zero_()

    def epoch_means(self) -> dict[str, Any]:
        """Means over the steps and ranks of the current epoch, as Python numbers; synchronizes the device."""
        means = {name: (self.world.mean(total) / max(self.step, 1)).tolist() for name, total in self.sums.items()}
        return means | {"loss_weights": torch.exp(-self.adaptive.log_vars.detach()).tolist()}

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, except the model's own."""
        state = {f"adaptive.{key}": value for key, value in self.adaptive.state_dict().items()}
        if self.ema is not None:
            state |= {f"average.{key}": value for key, value in self.ema.sums.items()}
        for name, parameter, optimizer in self._optimized():
            moments = optimizer.state[parameter].items()
            state |= {f"optim.{name}.{key}": value for key, value in moments if value is not None}
        for key, value in self._own_state().items():
            for rank, part in enumerate(self.world.gather(value)):
                state[f"rank{rank}.{key}" if rank else key] = part
        return state

    def restore(self, state: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Resume from a checkpoint: the tensors of `state()`, and the model's under the prefix "model.".

        If another number of processes saved them, the ranks start with the mean of their sums and BN statistics, and
        ranks above 0 with new random states. Raises StateMismatch, before any change, for tensors of another run.
        """
        ranks = states_of_ranks(state)
        self._check(state, ranks)
        self.model.load_state_dict(with_prefix(state, "model."))
        self.adaptive.load_state_dict(with_prefix(state, "adaptive."))
        if self.ema is not None:
            for name, value in with_prefix(state, "average.").items():
                self.ema.sums[name].copy_(value)
        for name, parameter, optimizer in self._optimized():
            moments = with_prefix(state, f"optim.{name}.")
            optimizer.state[parameter] = {key: like(parameter, value) for key, value in moments.items()}
        same = len(ranks) == self.world.size
        own = ranks[self.world.rank if same else 0]
        for key, tensor in self._averaged_state().items():
            if key in own:
                tensor.copy_(own[key] if same else torch.stack([rank[key] for rank in ranks]).mean(0))
        if same or self.world.is_main:
            torch.set_rng_state(own["random.cpu"].cpu())
            if self.device.type == "cuda" and "random.cuda" in own:
                torch.cuda.set_rng_state(own["random.cuda"].cpu(), self.device)
        self.epoch, self.step = epoch, step

    def _check(self, state: Mapping[str, Tensor], ranks: Sequence[Mapping[str, Tensor]]) -> None:
        """Raise StateMismatch unless `restore` can take the tensors."""
        shared = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        shared |= {f"adaptive.{key}": value for key, value in self.adaptive.state_dict().items()}
        if self.ema is not None:
            shared |= {f"average.{key}": value for key, value in self.ema.sums.items()}
        for name, parameter, optimizer in self._optimized():
            for key in self._moments(optimizer):
                shared[f"optim.{name}.{key}"] = torch.zeros(()) if key == "step" else parameter
        own = self._averaged_state() | self._own_state()  # one process and other devices lack some of them
        own = {key: value for key, value in own.items() if key in state or key == "random.cpu"}
        check_state(state, shared | own)
        for rank in ranks[1:]:
            check_state(rank, own)

    def _own_state(self) -> dict[str, Tensor]:
        """The tensors that differ from rank to rank."""
        own = {f"sums.{name}": value for name, value in self.sums.items()}
        own["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            own["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.world.size > 1:
            own |= self._averaged_state()
        return own

    def _averaged_state(self) -> dict[str, Tensor]:
        """The tensors that differ from rank to rank, without random states, which cannot be averaged."""
        sums = {f"sums.{name}": value for name, value in self.sums.items()}
        return sums | {f"statistics.{name}": value for name, value in self._running_statistics().items()}

    def _running_statistics(self) -> dict[str, Tensor]:
        """BN running means and variances, of the model and the EMA; they differ from rank to rank within an epoch."""
        statistics = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        if self.ema is not None:
            statistics |= {f"average.{name}": self.ema.sums[name] for name in statistics}
        return statistics

    def _optimized(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter, self.optimizer
        for name, parameter in self.adaptive.named_parameters():
            yield f"adaptive.{name}", parameter, self.adam

    def _moments(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """Names of the tensors that an optimizer keeps per parameter after its first step."""
        if isinstance(optimizer, torch.optim.Adam):
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
    """The items; a profile shows the time of waiting for each of them under `name`."""
    while True:
        with record_function(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
