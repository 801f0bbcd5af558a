"""`make abuse`: hostile and clumsy cases, counted by class in benchmarks/results/abuse.json.

    make abuse                               # at most 20 minutes
    make abuse ARGS=--all                    # everything
    make abuse ARGS="-k disk_full --case 7"  # one case

A run of some cases, or one that is interrupted, leaves the table as it is. A failure prints the command that
repeats it.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import Lost, finish

from benchmarks.record import commit, machine, short, write_record
from semimoe_fast import synthetic
from semimoe_fast.errors import UserError
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.config import TrainConfig

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)  # a forked child has no pool of threads

ROOT = Path(__file__).parents[2]
COLUMNS = ("tried", "one line", "worked", "failed", "lost")
COMMIT = pytest.StashKey[str]()  # at the start of the session
TABLE = pytest.StashKey[dict[str, dict[str, int]]]()

Attempt = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="abuse: all cases, for two hours on two cores")
    parser.addoption("--case", help="abuse: only the case of this name")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}
    config.stash[COMMIT] = short(commit())


@pytest.fixture
def attempt(request: pytest.FixtureRequest) -> Iterator[Attempt]:
    """Function (class, name, case, *arguments) that calls case(*arguments) and counts its outcome in the table.

    A case returns the name of a column, or None if it worked. It raises Lost, UserError or OSError if files of a run
    are lost, and any other exception if it failed otherwise. The test fails after its last case, with a command for
    each failure.
    """
    config, failures = request.config, []

    def call(title: str, name: object, case: Callable[..., str | None], *arguments: object) -> None:
        if config.getoption("--case") not in (None, str(name)):
            return
        row = config.stash[TABLE].setdefault(title, dict.fromkeys(COLUMNS, 0))
        row["tried"] += 1
        reason = ""
        try:
            outcome = case(*arguments) or "worked"
        except (Lost, UserError, OSError) as error:  # the files of a run, which nobody has touched, cannot be read
            outcome, reason = "lost", str(error)
        except Exception as error:
            outcome, reason = "failed", f"{type(error).__name__}: {error}"
        row[outcome] += 1
        if outcome in ("failed", "lost"):
            command = shlex.join(["pytest", request.node.nodeid, "--case", str(name)])
            failures.append(f"{outcome}: {command}\n    {reason[-1500:]}")

    yield call
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[str], dict[str, int]]:
    """Function (class) -> its row of the table, for tests that count their cases themselves."""
    return lambda title: request.config.stash[TABLE].setdefault(title, dict.fromkeys(COLUMNS, 0))


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether --all is given."""
    return request.config.getoption("--all")


# ------------------------------------------------------------------------------------------------- an uninterrupted run


@dataclass(frozen=True)
class Uninterrupted:
    """A finished run of two labeled, four unlabeled and two validation images, three epochs of two steps."""

    config: TrainConfig
    folder: Path
    seconds: float


@pytest.fixture(scope="session", params=[1, 2], ids=["one process", "two processes"])
def processes(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    data = tmp_path_factory.mktemp("data") / "glands"
    synthetic.write(synthetic.Folder(data, labeled=2, unlabeled=4, val=2, size=40))
    return dataclasses.replace(
        SYNTHETIC,
        data=data,
        image_size=32,
        width=2,
        epochs=3,
        labeled_batch=2,
        unlabeled_batch=2,
        warmup_epochs=1,
        lr=0.1,
        val_every=1,
        device="cpu",
        seed=3,
    )


def train_undisturbed(config: TrainConfig, parent: Path, processes: int) -> Uninterrupted:
    started = time.monotonic()
    finish(config, parent / "run", processes)
    return Uninterrupted(config, parent / "run", time.monotonic() - started)


@pytest.fixture(scope="session")
def uninterrupted(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return train_undisturbed(config, tmp_path_factory.mktemp("uninterrupted"), 1)


@pytest.fixture(scope="session")
def uninterrupted_by(processes: int, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The run of as many processes as `processes`."""
    return train_undisturbed(config, tmp_path_factory.mktemp("uninterrupted"), processes)


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Add the counts of a process of pytest-xdist to the table."""
    for title, counts in getattr(node, "workeroutput", {}).get("abuse", {}).items():
        row = node.config.stash[TABLE].setdefault(title, dict.fromkeys(COLUMNS, 0))
        for column, count in counts.items():
            row[column] += count


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table, unless -k, --case or Ctrl-C have left out cases."""
    config = session.config
    rows = dict(sorted(config.stash[TABLE].items()))
    if hasattr(config, "workeroutput"):  # one of several processes
        config.workeroutput["abuse"] = rows
        return
    for title, row in rows.items():
        print(f"\n{title}: {', '.join(f'{count} {column}' for column, count in row.items())}", end="")
    chosen = config.getoption("--case") or config.getoption("keyword") or config.args != ["tests/abuse"]
    if chosen or not rows or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    command = "make abuse ARGS=--all" if config.getoption("--all") else "make abuse"
    table = {
        "title": f"`{command}`",
        "columns": ["class", *COLUMNS],
        "rows": [[title, *row.values()] for title, row in rows.items()],
    }
    write_record(
        ROOT / "benchmarks" / "results" / "abuse.json",
        machine(len(os.sched_getaffinity(0))),
        config.stash[COMMIT],
        [command],
        {"cases": table},
        ("torch", "numpy", "pillow", "tifffile"),
    )
