"""The folder of a run: its path, its files, and checks that no other run uses it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from datetime import datetime
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from .config import CONFIG_FILE, MUTABLE, TrainConfig, read_config
from .lock import FolderLock

RUNS = Path("runs")
METRICS_FILE = "metrics.jsonl"
BEST, LAST = "best.safetensors", "last.safetensors"
OVERLAYS = "overlays.png"


def cache_folder(config: TrainConfig) -> Path:
    """Folder of decoded images: beside the run folder, so that runs with the same parent folder share it."""
    run = config.resume or config.out
    return (RUNS if run is None else run.resolve().parent) / "cache"


def new_folder(config: TrainConfig, lock: FolderLock) -> Path:
    """Create and lock the run folder, --out or runs/NAME-DATE-TIME, and write config.json. Raises UserError."""
    folder = _create_folder(config)
    lock.take(folder)
    if config.out is not None:
        refuse_used(folder)  # another process may have written into it since the first check
    _write_config(folder, config)
    return folder


def keep_changes(config: TrainConfig) -> None:
    """Store options that --resume has changed, so that the next --resume has them too; --profile is for once."""
    stored = read_config(config.resume)
    names = [name for name in MUTABLE if name != "profile"]
    changed = dataclasses.replace(stored, **{name: getattr(config, name) for name in names})
    if changed != stored:
        _write_config(config.resume, changed)


def _write_config(folder: Path, config: TrainConfig) -> None:
    write_text(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def refuse_used(folder: Path) -> None:
    """Raise UserError if --out is a file or a folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --out")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        resume = f", or --resume {shlex.quote(str(folder))} to continue its run"
        remedy = resume if (folder / CONFIG_FILE).exists() else ""
        raise UserError(f"{folder} is not empty; give another --out{remedy}")


def _create_folder(config: TrainConfig) -> Path:
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        return config.out
    name = "synthetic" if config.data is None else config.data.resolve().name
    stem = RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in itertools.count(1):
        folder = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run started in the same second
            continue
        break
    return folder
