"""Trouble with files during a run: a full disk, no permission, vanished and changed files, a wrong clock.

Each run either does its work, to the last bit, or ends with one line; then it goes on when the trouble is over, to the
last bit. trouble.py says how the trouble is made.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import finish, nothing, require_same, spread, start
from trouble import failing, fill_disk, nth, on_change, on_opening


@pytest.fixture
def survive(uninterrupted, tmp_path: Path) -> Callable[..., str]:
    """Function (name, trouble, repair): train under trouble, and once more after the repair if one line ended it.

    trouble(parent) is called in the child, where parent is the folder that holds the run and the cache.
    """

    def call(name: str, trouble: Callable[[Path], object], repair: Callable[[], object] = nothing) -> str:
        run = tmp_path / name / "run"
        run.parent.mkdir()
        (child,) = start(uninterrupted.config, run, before=lambda: trouble(run.parent))
        ended = child.wait()
        repair()
        if ended.outcome == "failed":
            raise AssertionError(ended.output)
        if ended.outcome == "one line":
            finish(uninterrupted.config, run)
        require_same(run, uninterrupted.folder)
        return ended.outcome

    return call


@pytest.fixture
def count(uninterrupted, tmp_path: Path) -> Callable[..., int]:
    """Function (watch) -> how often an undisturbed run calls what watch(parent, call) has registered."""

    def call(watch: Callable[[Path, Callable[[str], object]], object]) -> int:
        run, log = tmp_path / "counted" / "run", tmp_path / "count"
        run.parent.mkdir()

        def note(_: str) -> None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, b".")
            os.close(file)

        (child,) = start(uninterrupted.config, run, before=lambda: watch(run.parent, note))
        assert child.wait().status == 0
        return log.stat().st_size

    return call


def test_disk_full(attempt, survive, count, everything: bool) -> None:
    """From the n-th opening for writing on, no file may grow beyond a random number of bytes."""

    def case(n: int) -> str:
        room = random.Random(n).choice((0, 100, 2000, 100_000))
        return survive(f"full {n}", lambda parent: on_opening(parent, nth(n, lambda _: fill_disk(room))))

    openings = count(on_opening)
    for n in spread(openings, openings if everything else 12):
        attempt("full disk", n + 1, case, n + 1)


@pytest.mark.parametrize("error", ["EACCES", "EROFS", "EIO"])
def test_changes_fail(attempt, survive, count, everything: bool, error: str) -> None:
    """The n-th change of files and all later ones fail: no permission, a read-only disk. Of a broken disk only one."""

    def case(n: int) -> str:
        fail = nth(n, failing(getattr(errno, error)), later=error != "EIO")
        return survive(f"{error} {n}", lambda parent: on_change(parent, fail))

    changes = count(on_change)
    for n in spread(changes, changes if everything else 6):
        attempt("changes of files fail", f"{error} {n + 1}", case, n + 1)


def test_images_vanish(attempt, survive, uninterrupted, everything: bool, tmp_path: Path) -> None:
    """The n-th image that the run opens is gone at that moment. Later it is back."""
    data = uninterrupted.config.data
    kept = shutil.copytree(data, tmp_path / "kept")

    def case(n: int) -> str:
        vanish = nth(n, os.unlink)
        repair = functools.partial(shutil.copytree, kept, data, dirs_exist_ok=True)
        return survive(f"vanish {n}", lambda _: on_opening(data, vanish, reads=True), repair)

    openings = 2 * len(list(data.rglob("*.png")))  # for its digest, and to decode it
    for n in spread(openings, openings if everything else 6):
        attempt("images vanish", n + 1, case, n + 1)


def test_clock_goes_backwards(attempt, survive, uninterrupted) -> None:
    """Each look at the clock gives an earlier time, and the images are from the year 2100."""

    def turn_back(parent: Path) -> None:
        now = time.time()
        clock = iter(range(10**9))
        time.time = lambda: now - 3600 * next(clock)
        for path in uninterrupted.config.data.rglob("*.png"):
            os.utime(path, (4102444800, 4102444800))

    attempt("clock goes backwards", "backwards", survive, "clock", turn_back)


def test_two_runs_on_one_cache(attempt, uninterrupted, everything: bool, tmp_path: Path) -> None:
    """Runs that start together and share a cache that is not yet there. Of two runs in one folder only one trains."""

    def case(number: int) -> None:
        folders = [tmp_path / f"shared {number}" / name for name in ("run", "other")]
        folders[0].parent.mkdir()
        children = [child for folder in folders for child in start(uninterrupted.config, folder)]
        for child in children:
            if (ended := child.wait()).status != 0:
                raise AssertionError(ended.output)
        for folder in folders:
            require_same(folder, uninterrupted.folder)
        if left := [path.name for path in (folders[0].parent / "cache").iterdir() if path.suffix != ".safetensors"]:
            raise AssertionError(f"the cache holds {left}")

    def same_folder(number: int) -> str:
        run = tmp_path / f"same {number}" / "run"
        run.parent.mkdir()
        children = [child for _ in range(2) for child in start(uninterrupted.config, run)]
        outcomes = sorted(child.wait().outcome for child in children)
        require_same(run, uninterrupted.folder)
        if outcomes != ["one line", "worked"]:
            raise AssertionError(f"two runs in one folder: {outcomes}")
        return "one line"

    for number in range(20 if everything else 3):
        attempt("two runs on one cache", f"two folders {number}", case, number)
        attempt("two runs in one folder", f"one folder {number}", same_folder, number)


def test_bits_of_the_cache_flip(attempt, survive, everything: bool, uninterrupted) -> None:
    """A random bit of each cached file is flipped, the file is cut, or filled with zeros."""
    cache = uninterrupted.folder.parent / "cache"

    def damage(parent: Path, seed: int) -> None:
        moments = random.Random(seed)
        for path in shutil.copytree(cache, parent / "cache").iterdir():
            content = bytearray(path.read_bytes())
            place = moments.randrange(len(content))
            if seed % 4 == 0:
                del content[place:]
            elif seed % 4 == 1:
                content[place:] = bytes(len(content) - place)
            else:
                content[place] ^= 1 << moments.randrange(8)
            path.write_bytes(content)

    for seed in range(200 if everything else 8):
        attempt("bits of the cache flip", seed, survive, f"flip {seed}", functools.partial(damage, seed=seed))
