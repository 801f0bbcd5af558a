"""The record of finished images: its lock on odd file systems and against other processes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from semimoe_fast.errors import UserError
from semimoe_fast.inference.finished import NAME, Finished, state_of


def test_a_file_that_another_process_removes_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a removed file would not keep out a third process."""
    flock, removed = fcntl.flock, []

    def flock_late(file: object, how: int) -> None:
        if not removed:
            removed.append(True)
            (tmp_path / NAME).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with Finished(tmp_path, {}) as finished:
        finished.begin()
        with pytest.raises(UserError, match="another process is predicting into this folder"):
            Finished(tmp_path, {})


def test_file_systems_without_locks_get_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    image = tmp_path / "a.png"
    image.touch()
    with Finished(tmp_path, {}) as finished:
        finished.begin()
        finished.add(state_of(image))
    assert "cannot be locked (No locks available); make sure that no other process" in capsys.readouterr().err
    with Finished(tmp_path, {}) as finished:
        assert image in finished
        assert (finished.resumed, finished.others) == (True, 0)
    with Finished(tmp_path, {"tta": "True"}) as finished:
        assert image not in finished
        assert (finished.resumed, finished.others) == (False, 1)


def test_an_image_that_changes_while_it_is_predicted_is_not_finished(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_text("before")
    with Finished(tmp_path, {}) as finished:
        finished.begin()
        state = state_of(image)
        image.write_text("something else")
        finished.add(state)
    with Finished(tmp_path, {}) as finished:
        assert finished.resumed
        assert image not in finished


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    with Finished(tmp_path, {}) as finished:
        finished.begin()
        finished.start(first)
    record = tmp_path / NAME
    record.write_text(record.read_text()[:-3])
    with Finished(tmp_path, {}) as finished:
        finished.begin()
        assert not finished.has_started(first)
        finished.start(second)
    with Finished(tmp_path, {}) as finished:
        assert finished.has_started(second)


def test_record_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(UserError, match=r"\.predict\.jsonl is not a file: remove it, or give another --out"):
        Finished(tmp_path, {})
