"""One training step by provider: the published trainer, ours, the bare U-Nets; and the first without each habit.

    make bench ARGS="-k step"

The providers are those of benchmarks.step_ratios. That script measures them in turn, which is more reliable on a shared
machine. `extra_info` has images per second, steps per round, device, threads and versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from .baseline import Habits, clock
from .step_ratios import CASES, HABITS, PROVIDERS, WARM_UP_ROUNDS, Case, Round, baseline, check, versions

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def measure(benchmark, case: Case, provider: AbstractContextManager[Round]) -> None:
    with provider as steps:
        benchmark.pedantic(steps, rounds=5, warmup_rounds=WARM_UP_ROUNDS)
    benchmark.extra_info.update(versions(), steps_per_round=case.steps)
    if benchmark.enabled:
        benchmark.extra_info["images_per_second"] = 2 * case.batch * case.steps / benchmark.stats["median"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark, case: Case, provider: str) -> None:
    benchmark.group = f"training step, {case}"
    check(case)
    measure(benchmark, case, PROVIDERS[provider](case))


@pytest.mark.parametrize("without", ["nothing", *HABITS])
def test_step_without_a_habit(benchmark, without: str) -> None:
    benchmark.group = f"training step of the baseline without one habit, {CASES[0]}"
    habits = Habits(**({} if without == "nothing" else {without: False}))
    check(CASES[0], habits)
    measure(benchmark, CASES[0], baseline(CASES[0], habits))
