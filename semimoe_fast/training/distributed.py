"""One run on several devices: `torchrun --nproc-per-node N -m semimoe_fast.train`, a process for each of them.

Every process (rank) holds the data and the model and trains its own rows of every batch; DistributedDataParallel
averages the gradients, so that the run is the one of a single process with the same global batch. What is small and
rare (metrics, votes, states) goes over gloo between the hosts and never waits for a device by itself.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..device import choose_device
from ..errors import UserError, explain, first_sentence

TIMEOUT = timedelta(minutes=10)  # until a rank that is alive and does nothing counts as lost
PATIENCE = timedelta(days=1)  # the same, while rank 0 does for all what takes as long as it takes: decoding the images

LAUNCH = "start several processes with torchrun, or unset WORLD_SIZE and RANK to train in one"

T = TypeVar("T")

_joined: list[dist.ProcessGroup] = []


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, the ordinary case, every method is trivial and nothing is set up."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine, where it picks the device
    store: dist.Store | None = None  # shared by all ranks; torchrun's agent keeps it, so it survives any of them
    patient: dist.ProcessGroup | None = None  # of all ranks, for waits of up to PATIENCE

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """How a run of this many processes is started, without its options."""
        if self.size == 1:
            return "python -m semimoe_fast.train"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        nodes = f"--nnodes {self.size // local} " if local < self.size else ""
        return f"torchrun {nodes}--nproc-per-node {local} -m semimoe_fast.train"

    def device(self, name: str) -> torch.device:
        """What `choose_device` gives; among several processes, each takes the CUDA device of its local rank."""
        if self.size == 1:
            return choose_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"--device is {name!r}, but every process takes a device of its own: give auto, cpu or cuda"
            )
        if name == "cpu" or not (name == "cuda" or torch.cuda.is_available()):
            return torch.device("cpu")
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(f"torch sees {count} CUDA devices: give at most --nproc-per-node {count}, or --device cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)  # NCCL's and Triton's choice too
        return device

    def share(self, batch: int) -> slice:
        """The rows of a batch that this rank trains."""
        rows = batch // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the ranks during the backward pass."""
        if self.size == 1:
            return module
        # It takes the two layouts of a 1 x 1 convolution for different ones, though they are the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # BN's running statistics stay each rank's own until the epoch ends, instead of rank 0's, sent at every step.
        known = inspect.signature(DistributedDataParallel).parameters
        own_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
        return DistributedDataParallel(module, gradient_as_bucket_view=True, **{own_buffers: False})

    def synchronize_batch_norm(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch normalization over the rows of all ranks, its parameters and their names kept."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = SyncBatchNorm  # the same layer with another forward
        return model

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape, in their order and on the CPU."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def mean(self, tensor: Tensor) -> Tensor:
        """Over the ranks, bitwise the same on each."""
        return tensor if self.size == 1 else torch.stack(self.gather(tensor)).mean(0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, bitwise the same on each."""
        return tensor if self.size == 1 else torch.stack(self.gather(tensor)).sum(0)

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers. It costs the hosts a fifth of a millisecond and their devices nothing."""
        return number if self.size == 1 else max(int(part) for part in self.gather(torch.tensor(number)))

    def wait(self) -> None:
        """Until every rank has come here."""
        self.max(0)

    def broadcast(self, text: Callable[[], str]) -> str:
        """What text() gives on rank 0; the others do not call it."""
        values = [text() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def main_first(self, call: Callable[[], T]) -> T:
        """call() on rank 0 and, where it came to no bad end, on the others: what it prints or refuses shows once."""
        if self.size == 1:
            return call()
        if not self.is_main:
            dist.barrier(self.patient)
            return call()
        result = call()
        dist.barrier(self.patient)
        return result

    def claim(self) -> bool:
        """Whether this is the first rank to say why the run ends."""
        try:
            return self.store is None or self.store.add("ended", 1) == 1
        except dist.DistError:  # the store is lost too: better said twice than never
            return True

    @contextmanager
    def watched(self, remedy: str) -> Iterator[None]:
        """End the process with one line where another has gone; nothing where that one has said why it goes."""
        try:
            yield
        except RuntimeError as error:
            if not _tells_of_loss(error):
                raise
            if self.claim():
                reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]
                print(f"error: another process of this run was lost ({reason}); {remedy}", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly exit would wait for what is still under way on the device, and that never ends


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun set up in the environment, or the world of one without it.

    The ranks leave it together; the first rank that meets an error of the user's prints it. Raises UserError where the
    environment is incomplete or the ranks do not meet.
    """
    if launched_size() == 1:
        yield World()
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except dist.DistError as error:
        raise UserError(f"the processes of this run do not meet ({first_sentence(error)}); {LAUNCH}") from error
    dist.init_process_group(
        store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )  # gloo, and NCCL where there is CUDA
    # For good, because DDP must not be the last to hold the group: it would end it with the interpreter's lock in hand,
    # for which the threads of gloo may be waiting that it then waits for (torch 2.13).
    _joined.append(dist.group.WORLD)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store, patient)
    try:
        with world.watched("start it again"):
            yield world
    except BaseException as error:
        first = world.claim()  # before the connections close, which the other ranks would take for a loss
        if (line := explain(error)) is None:
            raise
        if first:
            print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        dist.destroy_process_group()


def launched_size() -> int:
    """WORLD_SIZE, or 1 without it. Raises UserError where the variables that torchrun sets are incomplete or wrong."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 1
    size = _number_from_environment("WORLD_SIZE", 1)
    if size > 1:
        _number_from_environment("RANK", 0, size - 1)
        _number_from_environment("MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set; {LAUNCH}")
        for name, least, most in (("LOCAL_RANK", 0, size - 1), ("LOCAL_WORLD_SIZE", 1, size)):
            if name in os.environ:
                _number_from_environment(name, least, most)
    return size


def _number_from_environment(name: str, least: int, most: float = math.inf) -> int:
    text = os.environ.get(name)
    if text is None:
        others = [f"{other} is {os.environ[other]}" for other in ("WORLD_SIZE", "RANK") if other in os.environ]
        raise UserError(f"{' and '.join(others)} but {name} is not set; {LAUNCH}")
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        limits = f"from {least} to {most}" if most < math.inf else f"from {least}"
        raise UserError(f"the environment variable {name} is {text!r}, not a number {limits}; {LAUNCH}")
    return int(text)


def _tells_of_loss(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, which start with the place in its sources."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the rows of all ranks, which have equally many: what nn.SyncBatchNorm is, on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        mean = _Mean.apply(wide.mean((0, 2, 3)))
        centerd = wide - mean[:, None, None]
        variance = _Mean.apply(centerd.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centerd * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Mean(torch.autograd.Function):
    """Mean over the ranks. Its gradient is one too, because DDP averages what becomes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_mean(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return _all_mean(grad_output)


def _all_mean(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x / dist.get_world_size()
