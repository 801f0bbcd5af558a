"""Train Semi-MoE: `python -m semimoe_fast.train`; `--help` lists the options.

A run folder holds config.json, metrics.jsonl (one line per epoch), best.safetensors, last.safetensors, curves.png and
overlays.png. A process locks the folder while it trains. `--resume FOLDER` continues an interrupted or killed run; the
result is bitwise that of an uninterrupted run.

Runs whose folders have the same parent share the decoded images of --data in PARENT/cache.

`torchrun --nproc-per-node N -m semimoe_fast.train` trains one run on N devices; only rank 0 writes and prints.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import torch

from .data.cache import Cache
from .device import configure
from .errors import UserError, explain, naming, one_line, run_command, warn
from .training import distributed
from .training.command_line import parse
from .training.config import TrainConfig
from .training.distributed import World
from .training.interruption import Interruption
from .training.lock import FolderLock
from .training.memory import require_memory
from .training.run import Run
from .training.run_folder import cache_folder, keep_changes, refuse_used
from .training.schedule import learning_rate
from .training.sources import load_data, note_of_masks, with_parts
from .training.speed import warn_if_long


def main(arguments: Sequence[str] | TrainConfig | None = None) -> None:
    """Train with command-line arguments (sys.argv[1:] if None) or with a configuration. Raises UserError."""
    with FolderLock() as lock:
        run = train(arguments, lock)
        if run.world.is_main:
            run.report()


def train(arguments: Sequence[str] | TrainConfig | None, lock: FolderLock) -> Run:
    """Train to the last epoch; exit with status 128 + signal number if a signal interrupts the run."""
    with distributed.join() as world:
        config = world.main_first(lambda: configuration(arguments, world, lock))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = world.device(config.device)
        world.main_first(lambda: require_memory(config, device, world.size))
        settings = configure(device, config.precision, config.deterministic)
        cache = Cache(cache_folder(config), writes=world.is_main)
        data, val = world.main_first(lambda: load_data(config, cache))  # the other ranks read the cache of rank 0
        if config.resume:
            run = Run.resume(config, data, val, device, world)
            if world.is_main:
                keep_changes(config)
        else:
            run = Run.start(config, data, val, device, world, lock)
        if world.is_main:
            before = f"epochs trained before: {run.trainer.epoch} of {config.epochs}" if config.resume else None
            notes = filter(None, [data.note, note_of_masks(config, data.labeled), before])
            print(f"{settings}; {run.trainer.settings}", *map(one_line, notes), sep="\n", flush=True)
            if not config.resume:
                warn_if_long(config, config.epochs * run.trainer.steps_per_epoch, device, world.size)
        remedy = f"continue with: {world.command} --resume {shlex.quote(str(run.folder))}"
        with Interruption(world) as interruption, world.exit_on_lost_rank(remedy):
            try:
                with naming(run.folder):  # TensorBoard's errors name no file
                    finished = run.train(interruption)
            except KeyboardInterrupt:  # the second Ctrl-C
                raise KeyboardInterrupt(f"interrupted; {remedy}") from None
            except OSError as error:
                raise UserError(f"{explain(error)}; {remedy}") from error
            if not finished:
                if world.is_main:
                    print(one_line(f"interrupted by {interruption.name}; {remedy}"), flush=True)
                sys.exit(128 + interruption.received)
    return run


def configuration(given: Sequence[str] | TrainConfig | None, world: World, lock: FolderLock) -> TrainConfig:
    """The checked configuration of the run. Raises UserError if the run folder is in use, before images are decoded."""
    if isinstance(given, TrainConfig):
        config = given
        config.check(world.size)
    else:
        config = parse(given, world.size)
    if not config.resume:
        config = with_parts(config)
    if world.is_main and config.data is not None and config.val in (config.labeled, config.unlabeled):
        warn(f"--val is {config.val}, whose images are also trained on: the scores say nothing of new images")
    if world.is_main and config.warmup_epochs >= config.epochs:
        reached = learning_rate(config, config.epochs - 1, config.base_lr)
        warn(
            f"--warmup-epochs is {config.warmup_epochs} of {config.epochs} epochs: --lr only rises to {reached:.3g}; "
            "give a smaller number"
        )
    if world.is_main and config.resume is not None:
        lock.take(config.resume)
    elif world.is_main and config.out is not None:
        refuse_used(config.out)
        if config.out.resolve() == cache_folder(config).resolve():
            raise UserError(f"--out is {config.out}, where decoded images are kept: give another folder")
    return config


if __name__ == "__main__":
    run_command(main)
    distributed.end_process()
