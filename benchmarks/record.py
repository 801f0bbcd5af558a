"""What a measurement says about itself, and its file for tables.py; results/README.md describes the file."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INNERMOST = re.compile(r"\[\n([^\[\]{}]*)\]")  # lists of JSON, as rows of a table, which get a line each
CPUINFO = Path("/proc/cpuinfo")  # on Linux alone


def machine(threads: int) -> str:
    """The processor, and the threads that compute.

    The name that a virtual machine shows may leave out the generation, which family and model tell.
    """
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    first = dict(re.findall(r"^(.+?)\s*: (.+)$", text.partition("\n\n")[0], re.MULTILINE))
    name = first.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in first:
        name += f" (family {first['cpu family']}, model {first['model']})"
    return f"{name}, {counted(threads, 'thread')}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def commit(*ignored: str) -> str | None:
    """The commit's hash, with -dirty if tracked files differ from it; None without git or a repository.

    ignored: patterns of files that may differ.
    """
    try:
        head = _git("rev-parse", "HEAD").stdout.strip()
        changed = _git("diff", "--quiet", "HEAD", "--", ".", *(f":!{pattern}" for pattern in ignored)).returncode
    except FileNotFoundError:
        return None
    return head + "-dirty" * bool(changed) if head else None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def short(commit: str | None) -> str:
    """The first 7 digits of what `commit` gives, and whether files differed from it."""
    return commit[:7] + commit[40:] if commit else "unknown"


def write_record(
    path: Path,
    machine: str,
    commit: str,
    command: Sequence[str],
    tables: dict[str, Any],
    packages: Sequence[str] = ("torch",),
) -> None:
    """packages: those whose versions matter."""
    record = {
        "machine": machine,
        "versions": {name: version(name).partition("+")[0] for name in packages},
        "commit": commit,
        "date": str(datetime.date.today()),
        "command": list(command),
        "tables": tables,
    }
    path.write_text(as_json(record))


def as_json(record: dict[str, Any]) -> str:
    """The text of a file, in which a row of a table is a line."""
    text = json.dumps(record, indent=1)
    return INNERMOST.sub(lambda row: f"[{' '.join(line.strip() for line in row[1].strip().splitlines())}]", text) + "\n"
