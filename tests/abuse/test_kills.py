"""SIGKILL at random moments from start to finish of a run, half of them twice in a row; each run resumes bitwise."""

from __future__ import annotations

import random
import time
from pathlib import Path

from runs import finish, require_same, start


def test_kills(attempt, uninterrupted_by, processes: int, everything: bool, tmp_path: Path) -> None:
    expected = uninterrupted_by

    def case(seed: int) -> None:
        moments, run = random.Random(seed), tmp_path / str(seed) / "run"
        run.parent.mkdir()
        for _ in range(1 + seed % 2):
            children = start(expected.config, run, processes)
            time.sleep(moments.uniform(0, expected.seconds))
            moments.shuffle(children)
            for child in children:  # torchrun kills the ranks that remain
                child.kill()
                time.sleep(moments.choice((0, 0.1)))
            for child in children:
                child.wait()
        finish(expected.config, run, processes)
        require_same(run, expected.folder)

    title = "SIGKILL and resume, one process" if processes == 1 else f"SIGKILL and resume, {processes} processes"
    for seed in range(200 if everything else 25):
        attempt(title, seed, case, seed)
