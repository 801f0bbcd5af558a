"""Write the results of a benchmark for tables.py; results/README.md describes the file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


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
