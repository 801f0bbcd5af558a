"""Tiny training runs in forked processes, and the comparison of two runs to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from forks import Child
from torch import distributed as dist

from semimoe_fast import checkpoint, train
from semimoe_fast.training.config import CONFIG_FILE, TrainConfig, read_config
from semimoe_fast.training.run_folder import BEST, LAST, METRICS_FILE

PICTURES = ("curves.png", "overlays.png")


class Lost(AssertionError):
    """A run that does not go on, or goes on differently."""


def nothing() -> None:
    pass


def start(config: TrainConfig, run: Path, processes: int = 1, before: Callable[[], object] = nothing) -> list[Child]:
    """Start or resume the run in folder `run`, one child a process. Each child calls `before` first."""
    if (run / CONFIG_FILE).exists():
        config = dataclasses.replace(read_config(run), resume=run)
    else:  # killed before it wrote its configuration
        config = dataclasses.replace(config, out=run)

    def main() -> None:
        before()
        train.main(config)

    return start_ranks(main, processes)


def start_ranks(call: Callable[[], object], processes: int) -> list[Child]:
    """The children that run `call`, in rank order.

    The parent plays the part of torchrun: it hosts the store of the ranks and sets their environment.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if processes > 1 else None

    def main(rank: int) -> None:
        if store is not None:
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        call()

    children = [Child(lambda rank=rank: main(rank)) for rank in range(processes)]
    children[0].store = store  # lives as long as the children
    return children


def finish(config: TrainConfig, run: Path, processes: int = 1) -> None:
    """Start or resume the run and train it to its end. Raises Lost."""
    for child in start(config, run, processes):
        ended = child.wait()
        if ended.status != 0:
            raise Lost(f"it does not resume: {ended.output[-2000:]}")


def require_same(run: Path, expected: Path) -> None:
    """Compare two finished runs: checkpoints, records without speeds, pictures. Raises Lost, UserError and OSError."""
    for name in (LAST, BEST):
        (metadata, tensors), (right_metadata, right) = (checkpoint.read(folder / name) for folder in (run, expected))
        if metadata != right_metadata or tensors.keys() != right.keys():
            raise Lost(f"{name} has other metadata or tensors")
        for key, value in tensors.items():
            if not torch.equal(value, right[key]):
                raise Lost(f"{key} of {name} differs")
    if records(run) != records(expected):
        raise Lost(f"{METRICS_FILE} differs")
    for name in PICTURES:
        if (run / name).read_bytes() != (expected / name).read_bytes():
            raise Lost(f"{name} differs")


def records(run: Path) -> list[dict]:
    """The records of the epochs without the measured times."""
    lines = (run / METRICS_FILE).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "speed"} for line in lines]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 .. count - 1, evenly spread, the first and the last included."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)}) if count > most else list(range(count))
