"""A pytest plugin that writes a line of JSON when a test starts and when it ends; a killed run keeps its results.

    python -m pytest -p benchmarks.gpu_lines --lines=FILE --done=FILE --first=PATTERN ...

Tests that match the first pattern run first, then those that match the second, and so on; slow tests run last. Tests
that --done names do not run again. If a failed test has broken the CUDA context of its process, all later tests would
fail too: the process ends with the exit status LOST, and pytest-xdist replaces such a worker.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LONGEST_MESSAGE = 4000  # characters of a failure's message
LOST = 77
KEPT = ("min", "median", "iqr", "rounds")  # statistics of a benchmark


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", help="file to append a line of JSON for each test to")
    parser.addoption("--done", help="file with such lines of an earlier run, which this one continues")
    parser.addoption("--first", action="append", default=[], help="regular expression of tests to run first")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lines") and not hasattr(config, "workerinput"):  # the controller of pytest-xdist, no worker
        config.pluginmanager.register(Lines(Path(config.getoption("--lines"))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    patterns, done = config.getoption("--first"), config.getoption("--done")
    ran = {json.loads(line)["test"] for line in Path(done).read_text().splitlines()} if done else set()
    items[:] = [item for item in items if item.nodeid not in ran]

    def rank(item: pytest.Item) -> tuple[bool, int]:
        slow = item.get_closest_marker("slow") is not None
        return slow, next((n for n, pattern in enumerate(patterns) if re.search(pattern, item.nodeid)), len(patterns))

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Put the result of a benchmark into its report."""
    measured = getattr(getattr(item, "funcargs", {}).get("benchmark"), "stats", None)
    if call.when == "call" and call.excinfo is None and measured is not None:
        result = {name: getattr(measured, name) for name in ("name", "group", "params", "extra_info")}
        result["stats"] = {name: getattr(measured.stats, name) for name in KEPT}
        item.user_properties.append(("benchmark", json.loads(json.dumps(result, default=str))))
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End a process whose CUDA context is broken, after the failure is written or sent to the controller.

    A capture that failed leaves its stream current and its memory pool in use, so that later tests would fail as well.
    """
    torch = sys.modules.get("torch")  # not imported here, where it would delay tests without CUDA
    if report.failed and torch is not None and torch.cuda.is_initialized():
        if "captur" in report.longreprtext:
            os._exit(LOST)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(LOST)


class Lines:
    """Appends the lines to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", message=report.longreprtext[-LONGEST_MESSAGE:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            line["message"] = report.longreprtext[-LONGEST_MESSAGE:]
        elif report.skipped:
            line["message"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.write(**line, **dict(report.user_properties))

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
