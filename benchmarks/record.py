"""What a measurement says about itself, and its file for tables.py; results/README.md describes the file."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def commit() -> str | None:
    """The commit's hash, with -dirty if tracked files differ from it; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def write_record(
    path: Path,
    machine: str,
    commit: str,
    command: Sequence[str],
    tables: dict[str, Any],
    libraries: Sequence[str] = ("torch",),
) -> None:
    """libraries: the packages whose versions matter."""
    record = {
        "machine": machine,
        "versions": {name: version(name).partition("+")[0] for name in libraries},
        "commit": commit,
        "date": str(datetime.date.today()),
        "command": list(command),
        "tables": tables,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
