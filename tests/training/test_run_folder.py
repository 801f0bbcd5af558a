"""A run folder: its lock, released when the process ends or is killed, and the options that it keeps."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from semimoe_fast import train
from semimoe_fast.errors import UserError
from semimoe_fast.training import run_folder
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.config import TrainConfig, read_config
from semimoe_fast.training.lock import LOCK_FILE, FolderLock

BUSY = "another process is training in this folder; wait until it ends"


def test_only_one_lock_at_a_time(tmp_path: Path) -> None:
    with FolderLock() as first, FolderLock() as second:
        first.take(tmp_path)
        with pytest.raises(UserError, match=BUSY):
            second.take(tmp_path)
    with FolderLock() as third:
        third.take(tmp_path)


def test_second_process_is_refused_on_resume_and_on_start(
    tiny_config: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    resumed = shutil.copytree(finished, tmp_path / "resumed")
    fresh = tmp_path / "fresh"  # the other process has just created it
    fresh.mkdir()
    before = {path: path.read_bytes() for path in resumed.iterdir() if path.is_file()}
    for folder, config in (
        (resumed, dataclasses.replace(read_config(resumed), resume=resumed)),
        (fresh, dataclasses.replace(tiny_config, out=fresh)),
    ):
        with FolderLock() as other:
            other.take(folder)
            with pytest.raises(UserError) as caught:
                train.main(config)
        assert str(caught.value).startswith(f"{folder}: {BUSY}")
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in fresh.iterdir()] == [LOCK_FILE]


def test_folder_filled_after_the_first_check_is_refused(tiny_config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file of another run").touch()
    with FolderLock() as lock, pytest.raises(UserError, match="is not empty"):
        run_folder.new_folder(dataclasses.replace(tiny_config, out=tmp_path), lock)


@pytest.mark.parametrize("out", [True, False])
def test_runs_that_start_at_once_never_share_a_folder(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: bool
) -> None:
    """With --out one of them gets the folder; without it each gets its own."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path / "runs")
    count, rounds = 8, 10
    barrier = Barrier(count)

    def start(attempt: int) -> Path | None:
        folder = tmp_path / f"run{attempt}" if out else None
        with FolderLock() as lock:
            barrier.wait()
            try:
                return run_folder.new_folder(dataclasses.replace(tiny_config, out=folder), lock)
            except UserError:
                return None

    with ThreadPoolExecutor(count) as pool:
        for attempt in range(rounds):
            folders = [folder for folder in pool.map(start, [attempt] * count) if folder is not None]
            assert len(folders) == len(set(folders)) == (1 if out else count)


KILLED_OWNER = """
import os, signal, sys
from pathlib import Path
from threading import Barrier
from semimoe_fast.training.lock import FolderLock

with FolderLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_killed_process_releases_the_lock(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", KILLED_OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout.readline() == b"taken\n"
    with FolderLock() as lock:
        with pytest.raises(UserError, match=BUSY):
            lock.take(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
        lock.take(tmp_path)


def test_file_system_without_locks_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock() as lock:
        lock.take(tmp_path)
    warning = f"warning: {tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}); make sure"
    assert capsys.readouterr().err.startswith(warning)


def test_named_pipe_is_no_lock_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_FILE)
    with FolderLock() as lock, pytest.raises(OSError, match="No such device"):
        lock.take(tmp_path)


def test_options_that_a_resumed_run_changes_are_kept(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = read_config(folder)
    train.main(dataclasses.replace(before, resume=folder, threads=1, recompute=True))
    assert read_config(folder) == dataclasses.replace(before, threads=1, recompute=True)
    run_folder.keep_changes(dataclasses.replace(before, resume=folder, threads=7, profile=True))
    assert read_config(folder) == dataclasses.replace(before, threads=7)


def test_the_first_folder_has_no_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FolderLock() as lock:
        assert re.fullmatch(r"synthetic-\d{8}-\d{6}", run_folder.new_folder(SYNTHETIC, lock).name)
