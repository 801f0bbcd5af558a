"""One run on several devices, one process per device: `torchrun --nproc-per-node N -m semimoe_fast.train`.

Every process (rank) holds all data and the whole model, and trains its own rows of every batch.
DistributedDataParallel (DDP) averages the gradients, so the run has the global batch of a run of one process. CPU
tensors (metrics, votes, states) go over gloo and do not synchronize the device.
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

from ..device import choose_device, cuda_devices
from ..errors import UserError, explain, first_sentence
from ..model import BatchNormReLU
from ..ops.skips import concatenate

TIMEOUT = timedelta(minutes=10)  # a rank that does not answer for so long counts as lost
LONG_TIMEOUT = timedelta(days=1)  # the same while rank 0 decodes images for all ranks

LAUNCH_REMEDY = "start several processes with torchrun, or unset WORLD_SIZE and RANK to train in one"

T = TypeVar("T")

_groups: list[dist.ProcessGroup] = []


@dataclass(frozen=True)
class World:
    """The processes of a run. World() is a run of one process, in which every method is trivial."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine, which selects the device
    store: dist.Store | None = None  # shared by all ranks; lives in torchrun's agent, so it outlives a lost rank
    long_waits: dist.ProcessGroup | None = None  # all ranks, with LONG_TIMEOUT

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """The command that starts a run of this many processes, without its options."""
        if self.size == 1:
            return "python -m semimoe_fast.train"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        nodes = f"--nnodes {self.size // local} " if local < self.size else ""
        return f"torchrun {nodes}--nproc-per-node {local} -m semimoe_fast.train"

    def device(self, name: str) -> torch.device:
        """`choose_device`, but with several processes the CUDA device of the local rank. Raises UserError."""
        if self.size == 1:
            return choose_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device is {name!r}, but every process needs its own device: give auto, cpu or cuda")
        if name == "cpu" or not (name == "cuda" or torch.cuda.is_available()):
            return torch.device("cpu")
        if self.local_rank >= (count := cuda_devices()):
            raise UserError(
                f"torch can use {count} CUDA devices: give at most --nproc-per-node {count}, or --device cpu"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)  # NCCL and Triton use the current device
        return device

    def share(self, batch: int) -> slice:
        """The rows of a global batch of `batch` images that this rank trains."""
        rows = batch // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module in DDP, which averages its gradients over the ranks in the backward pass."""
        if self.size == 1:
            return module
        # Harmless: the two layouts of a 1 x 1 convolution have different strides but the same memory order.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Each rank keeps its own BN running statistics until the epoch ends; DDP must not broadcast those of rank 0.
        known = inspect.signature(DistributedDataParallel).parameters
        own_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
        return DistributedDataParallel(module, gradient_as_bucket_view=True, **{own_buffers: False})

    def synchronize_batch_norm(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with synchronized batch normalization; parameters and their names stay the same."""
        if self.size == 1:
            return model
        for layer in model.modules():
            if isinstance(layer, BatchNormReLU):
                layer.process_group = None  # all ranks
                layer.__class__ = SyncBatchNormReLU if device.type == "cuda" else CPUSyncBatchNormReLU
        return model

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in rank order, on the CPU. All ranks must pass the same shape."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, bitwise equal on all ranks."""
        return tensor if self.size == 1 else torch.stack(self.gather(tensor)).mean(0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, bitwise equal on all ranks."""
        return tensor if self.size == 1 else torch.stack(self.gather(tensor)).sum(0)

    def max(self, number: int) -> int:
        """The maximum over the ranks. It takes the CPU 0.2 ms and does not synchronize the device."""
        return number if self.size == 1 else max(int(part) for part in self.gather(torch.tensor(number)))

    def wait(self) -> None:
        """Block until every rank has called this."""
        self.max(0)

    def broadcast(self, text: Callable[[], str]) -> str:
        """The result of text() on rank 0, on all ranks; the other ranks do not call text()."""
        if self.size == 1:
            return text()
        encoded = os.fsencode(text()) if self.is_main else b""
        buffer = torch.zeros(self.max(len(encoded)), dtype=torch.uint8)
        buffer[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return os.fsdecode(bytes(buffer.tolist()))

    def main_first(self, call: Callable[[], T]) -> T:
        """Return call(), which rank 0 runs first; if it raises there, the other ranks do not run it."""
        if self.size == 1:
            return call()
        if not self.is_main:
            dist.barrier(self.long_waits)
            return call()
        result = call()
        dist.barrier(self.long_waits)
        return result

    def first_to_report(self) -> bool:
        """True for the first rank that calls this: it prints why the run ends."""
        try:
            return self.store is None or self.store.add("ended", 1) == 1
        except dist.DistError:  # the store is lost too: print rather than stay silent
            return True

    @contextmanager
    def exit_on_lost_rank(self, remedy: str) -> Iterator[None]:
        """A context that exits the process with one line if another rank is lost, unless that rank has said why."""
        try:
            yield
        except RuntimeError as error:
            if not _means_lost_rank(error):
                raise
            if self.first_to_report():
                reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]
                print(f"error: another process of this run was lost ({reason}); {remedy}", file=sys.stderr, flush=True)
            os._exit(1)  # sys.exit would wait forever for pending collectives on the device


@contextmanager
def join() -> Iterator[World]:
    """A context with the World of torchrun's environment variables, or World() without them.

    If the body raises an error that `explain` knows, the first rank that raises it prints it, and all ranks exit.
    Raises UserError if environment variables are missing or wrong, or if the ranks cannot connect.
    """
    if launched_size() == 1:
        yield World()
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except dist.DistError as error:
        raise UserError(
            f"the processes of this run cannot connect ({first_sentence(error)}); {LAUNCH_REMEDY}"
        ) from error
    # The default backend: gloo for CPU tensors, and NCCL for CUDA tensors if available.
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    # Keep a reference for the life of the process. Otherwise DDP may hold the last one, and its destructor joins the
    # gloo threads while it holds the GIL, which those threads may be waiting for: a deadlock (torch 2.13).
    _groups.append(dist.group.WORLD)
    long_waits = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store, long_waits)
    try:
        with world.exit_on_lost_rank("start it again"):
            yield world
    except BaseException as error:
        first = world.first_to_report()  # before connections close, which the other ranks would report as a lost rank
        if (line := explain(error)) is None:
            raise
        if first:
            print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        dist.destroy_process_group()


def end_process() -> None:
    """End this process with status 0 if it has joined other processes.

    When Python ends by itself, it destroys `_groups`, and their threads may still run: rarely, on a busy machine, this
    aborts a rank whose work is done, and torchrun then reports a failure (torch 2.13).
    """
    if _groups:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def launched_size() -> int:
    """WORLD_SIZE, or 1 if unset. Raises UserError if variables that torchrun sets are missing or wrong."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 1
    size = _number_from_environment("WORLD_SIZE", 1)
    if size > 1:
        _number_from_environment("RANK", 0, size - 1)
        _number_from_environment("MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set; {LAUNCH_REMEDY}")
        for name, least, most in (("LOCAL_RANK", 0, size - 1), ("LOCAL_WORLD_SIZE", 1, size)):
            if name in os.environ:
                _number_from_environment(name, least, most)
    return size


def _number_from_environment(name: str, least: int, most: float = math.inf) -> int:
    text = os.environ.get(name)
    if text is None:
        others = [f"{other} is {os.environ[other]}" for other in ("WORLD_SIZE", "RANK") if other in os.environ]
        raise UserError(f"{' and '.join(others)} but {name} is not set; {LAUNCH_REMEDY}")
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        limits = f"from {least} to {most}" if most < math.inf else f"from {least}"
        raise UserError(f"the environment variable {name} is {text!r}, not a number {limits}; {LAUNCH_REMEDY}")
    return int(text)


def _means_lost_rank(error: RuntimeError) -> bool:
    """Whether an error comes from a broken connection. gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


class SyncBatchNormReLU(nn.SyncBatchNorm):
    """BatchNormReLU with the statistics of all ranks, group by group."""

    def forward(self, x: Tensor, groups: int = 1, skip: Tensor | None = None) -> Tensor:
        y = torch.cat([super(SyncBatchNormReLU, self).forward(part) for part in x.chunk(groups)]).relu()
        return concatenate(skip, y)


class CPUSyncBatchNormReLU(BatchNormReLU):
    """SyncBatchNormReLU for CPU tensors. All ranks have equal batch sizes."""

    def forward(self, x: Tensor, groups: int = 1, skip: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, skip=skip)
        y = torch.cat([self._normalized(part) for part in x.chunk(groups)]).relu()
        return concatenate(skip, y)

    def _normalized(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = _Mean.apply(wide.mean((0, 2, 3)))
        centered = wide - mean[:, None, None]
        variance = _Mean.apply(centered.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Mean(torch.autograd.Function):
    """Mean over the ranks. Backward averages grad_output over the ranks, because DDP averages the gradients too."""

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
