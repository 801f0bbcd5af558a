"""The helper that retries to start a process."""

from __future__ import annotations

import subprocess

import pytest
from patience import run_patiently


def test_start_is_retried_while_fork_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    results, pauses = [BlockingIOError(), BlockingIOError(), subprocess.CompletedProcess("true", 0)], []

    def run(command: str) -> subprocess.CompletedProcess:
        result = results.pop(0)
        if isinstance(result, BlockingIOError):
            raise result
        return result

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("time.sleep", pauses.append)
    assert run_patiently("true").returncode == 0
    assert pauses == [1, 2]


def test_last_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: str) -> None:
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(BlockingIOError):
        run_patiently("true")
