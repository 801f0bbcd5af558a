"""Stopwatch against a fake clock, FLOPs against a formula, memory against /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from semimoe_fast import ops
from semimoe_fast.training.command_line import parse
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.speed import Stopwatch, first_look, flops_per_step, peak_memory_bytes, warn_if_long


class Clock:
    """A fake clock that only `epoch` advances."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(time, "perf_counter", lambda: self.now)

    def epoch(self, watch: Stopwatch, *steps: float) -> None:
        watch.start()
        for seconds in steps:
            self.now += seconds
            watch.tick()
        watch.stop()
        self.now += 100  # validation


def test_speed_excludes_a_warm_up_of_several_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps per epoch, five steps of warm-up."""
    clock = Clock(monkeypatch)
    watch = Stopwatch(torch.device("cpu"), 5)
    for _ in range(2):
        clock.epoch(watch, 8, 8)
        assert watch.seconds_per_step() is None
    clock.epoch(watch, 8, 1)
    assert (watch.seconds_per_step(), watch.warm_up_seconds) == (1, 40)
    clock.epoch(watch, 2, 4)
    assert (watch.seconds_per_step(), watch.warm_up_seconds) == (3, 40)


def test_epoch_of_only_warm_up_steps_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch(torch.device("cpu"), 2)
    clock.epoch(watch, 8, 8)
    assert (watch.seconds_per_step(), watch.warm_up_seconds) == (None, 16)


def test_peak_memory_of_a_gpu_starts_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    clock, watch = Clock(monkeypatch), Stopwatch(torch.device("cuda:1"), 3)
    assert not calls
    clock.epoch(watch, 1, 1)
    clock.epoch(watch, 1, 1, 1)
    assert calls == ["reset cuda:1"]


def flops_by_formula(width: int, side: int, images: int) -> int:
    """Two operations per weight and pixel: forward, weight gradient, and input gradient (except for the images)."""
    total = 0
    for rows in (2, 1, 2):  # output channels of the experts' heads
        channels = [width * 2**level for level in range(5)]
        convolutions = [(c, rows, 1, side) for c in channels[:1]]  # (in, out, kernel, side)
        for level, out in enumerate(channels):
            here = side // 2**level
            convolutions += [(channels[level - 1] if level else 3, out, 3, here), (out, out, 3, here)]  # down
            if level < 4:  # up: transposed convolution (16 products per input pixel), then two convolutions
                convolutions += [(2 * out, out, 4, here // 2), (2 * out, out, 3, here), (out, out, 3, here)]
        for ins, outs, kernel, here in convolutions:
            passes = 2 if ins == 3 else 3
            total += passes * 2 * images * ins * outs * kernel**2 * here**2
    return total


def test_a_run_of_days_is_said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recipe on a CPU; not the options of a first look, not many processes, and not on a GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu, published = torch.device("cpu"), TrainConfig()
    warn_if_long(TrainConfig(width=8, image_size=64), 20 * 34, cpu, 1)
    warn_if_long(published, 6800, cpu, 64)
    warn_if_long(published, 6800, torch.device("cuda"), 1)
    assert not capsys.readouterr().err
    warn_if_long(published, 6800, cpu, 1)
    line = (
        "6800 steps at --width 64 and --image-size 256 probably take more than 3.1 days on this CPU; for a first look"
    )
    assert capsys.readouterr().err == f"warning: {line} add {first_look(published)}\n"


@pytest.mark.parametrize("recipe", [[], ["--recipe", "strong"]])
def test_the_options_of_a_first_look_are_accepted(recipe: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    words = ["--data", str(tmp_path), *recipe]
    looked = parse([*words, *first_look(parse(words)).split()])
    assert (looked.width, looked.epochs, looked.lr) == (8, 20, 0.015 if recipe else 0.1)


@pytest.mark.parametrize(("width", "side", "images"), [(2, 32, 1), (4, 64, 3)])
def test_flops_match_the_formula(width: int, side: int, images: int, caplog: pytest.LogCaptureFixture) -> None:
    ops._choose_and_log.cache_clear()
    state = torch.get_rng_state()
    assert flops_per_step(width, side, images) == flops_by_formula(width, side, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records  # no fallback: the meta tensors of the count compute nothing
    flops_per_step.cache_clear()
    with ops.backend("fused"):
        assert flops_per_step(width, side, images) == flops_by_formula(width, side, images)


def test_peak_memory_is_at_least_the_resident_memory() -> None:
    held = torch.ones(2**25)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = peak_memory_bytes(torch.device("cpu"))
    assert held.nbytes < 0.99 * resident < peak < 100 * resident  # a wrong unit is off by 1024


def test_peak_memory_of_macos_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    for platform, peak in (("linux", 3 * 2**30), ("darwin", 3 * 2**20)):
        monkeypatch.setattr("sys.platform", platform)
        assert peak_memory_bytes(torch.device("cpu")) == peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu_counts_tensors() -> None:
    device = torch.device("cuda")
    before = peak_memory_bytes(device)
    held = torch.empty(before + 2**20, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= held.nbytes > before
