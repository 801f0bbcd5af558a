"""Train Semi-MoE: `python -m semimoe_fast.train`, `--help` for everything it takes.

A run folder holds config.json, metrics.jsonl (a line an epoch), best.safetensors and last.safetensors, curves.png and
overlays.png, and is locked while a process trains in it. A run that was interrupted or killed continues with
`--resume FOLDER` and ends as if it had not been.

Images from --data are decoded by the first of the runs that lie beside each other; the others find them in `cache`.

`torchrun --nproc-per-node N -m semimoe_fast.train` trains the same run on N devices; rank 0 alone writes and prints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from .data.cache import Cache
from .device import configure
from .errors import run_command
from .training import distributed
from .training.config import TrainConfig, parse
from .training.distributed import World
from .training.interruption import Interruption
from .training.lock import FolderLock
from .training.run import Run
from .training.run_folder import cache_folder, refuse_used
from .training.sources import load_data


def main(arguments: Sequence[str] | TrainConfig | None = None) -> None:
    """Train as a command line says, that of the process by default, or as a configuration does. Raises UserError."""
    with FolderLock() as lock:
        run = train(arguments, lock)
        if run.world.is_main:
            run.report()


def train(arguments: Sequence[str] | TrainConfig | None, lock: FolderLock) -> Run:
    """Train to the last epoch; exits where a signal interrupts that."""
    with distributed.join() as world:
        config = world.main_first(lambda: configuration(arguments, world, lock))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = world.device(config.device)
        settings = configure(device, config.precision, config.deterministic)
        cache = Cache(cache_folder(config), writes=world.is_main)
        data, val = world.main_first(lambda: load_data(config, cache))  # the others find what it decoded
        if config.resume:
            run = Run.resume(config, data, val, device, world)
        else:
            run = Run.start(config, data, val, device, world, lock)
        if world.is_main:
            print(f"{settings}; {run.trainer.settings}", flush=True)
        remedy = f"continue with: {world.command} --resume {run.folder}"
        with Interruption(world) as interruption, world.watched(remedy):
            if not run.train(interruption):
                if world.is_main:
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
    if world.is_main and config.resume is not None:
        lock.take(config.resume)
    elif world.is_main and config.out is not None:
        refuse_used(config.out)
    return config


if __name__ == "__main__":
    run_command(main)
