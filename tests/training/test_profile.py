"""The profile of a step: each microsecond in one category, backward operators in the category of their forward."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function, schedule

from semimoe_fast import train
from semimoe_fast.model import MultiGating
from semimoe_fast.training import profile
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.profile import CATEGORIES, PAUSE, categorize, time_by_category

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROW = re.compile(r"^(\S.*?) +(\d+\.\d\d) +(\d+\.\d)%$", re.MULTILINE)


@pytest.fixture(scope="module", params=DEVICES)
def profiled(request, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a profiled run of nine steps in three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "profiled"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.main(dataclasses.replace(tiny_config, device=request.param, steps_per_epoch=3, profile=True, out=folder))
    return folder, output.getvalue()


def test_table_lists_all_categories(profiled: tuple[Path, str]) -> None:
    """The rows list all categories, longest first, and add up to the step."""
    folder, output = profiled
    on_cpu = "; CPU, threads: " in output
    *rows, (last, total, whole) = [(name, float(ms), float(share)) for name, ms, share in ROW.findall(output)]
    assert (last, whole) == ("step", 100.0)
    assert sorted(name for name, _, _ in rows) == sorted(CATEGORIES)
    assert [ms for _, ms, _ in rows] == sorted((ms for _, ms, _ in rows), reverse=True)
    rounding = len(rows) / 2
    assert sum(ms for _, ms, _ in rows) == pytest.approx(total, abs=0.01 * rounding)
    assert sum(share for _, _, share in rows) == pytest.approx(100, abs=0.1 * rounding)
    share_of = {name: share for name, _, share in rows}
    # in a step this small, the kernels of a GPU take almost no time
    for name in ("convolutions", "batch normalization", "gates", "host gaps") if on_cpu else ("host gaps",):
        assert share_of[name] > 1, name
    assert all(ms > 0 for name, ms, _ in rows if name in ("convolutions", "batch normalization", "gates"))
    assert "mean of 5 steps after 3 of warm-up" in output
    speed, flops = re.search(r"([\d.]+) images/s, ([\d.e-]+) TFLOP/s", output).groups()
    assert float(speed) == pytest.approx(4 / (total / 1000), rel=0.02)
    assert 0 < float(flops) < 1000
    assert f"trace: {folder / profile.TRACE_FILE}" in output


def test_trace_shows_the_regions_of_the_recorded_steps(profiled: tuple[Path, str]) -> None:
    with gzip.open(profiled[0] / profile.TRACE_FILE) as file:
        events = json.load(file)["traceEvents"]
    marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in [*profile.REGIONS, "Optimizer.step#FusedSGD.step", "Optimizer.step#Adam.step"]:
        assert marks.count(name) >= profile.STEPS, name
    assert sum(name.startswith("ProfilerStep#") for name in marks) == profile.STEPS
    assert any("convolution" in event["name"] for event in events if event.get("cat") == "cpu_op")


@pytest.mark.slow
def test_a_run_that_ends_in_the_warm_up_has_no_profile(tiny_config: TrainConfig, tmp_path: Path, capsys) -> None:
    train.main(dataclasses.replace(tiny_config, epochs=1, profile=True, out=tmp_path / "run"))
    output = capsys.readouterr().out
    assert "nothing to show after 2 steps" in output
    assert "images/s" not in output
    assert not (tmp_path / "run" / profile.TRACE_FILE).exists()


@pytest.mark.slow
def test_profiling_error_does_not_end_the_run(tiny_config: TrainConfig, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(profile, "time_by_category", lambda *_: 1 / 0)
    train.main(dataclasses.replace(tiny_config, epochs=2, profile=True, out=tmp_path / "run"))
    output = capsys.readouterr().out
    assert "--profile: no result (ZeroDivisionError: division by zero); the run goes on" in output
    assert "last, gated" in output


def record(step: Callable[[], None]) -> list[FunctionEvent]:
    """The profiler events of two steps."""
    plan = schedule(wait=0, warmup=1, active=2)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], schedule=plan, acc_events=True) as profiler:
        for _ in range(3):
            step()
            profiler.step()
    return profiler.events()


def test_categories_add_up_to_the_step() -> None:
    """Sleep, which has no operator, is data wait in the region "data", not counted between epochs, else a host gap."""
    matrix = torch.randn(300, 300)

    def step() -> None:
        with record_function("data"):
            time.sleep(0.02)
            with record_function("augmentation"):
                matrix @ matrix
        time.sleep(0.04)
        with record_function(PAUSE):
            time.sleep(0.3)
            matrix @ matrix
        with record_function("gates"):
            matrix @ matrix

    events = record(step)
    steps, pauses = (
        sum(event.cpu_time_total for event in events if event.name == name) for name in ("ProfilerStep*", PAUSE)
    )
    times = time_by_category(events, 2, on_cuda=False)
    assert sum(times.values()) == pytest.approx(steps - pauses)
    assert 40e3 <= times["data wait"] < 80e3 <= times["host gaps"] < 600e3
    assert times["gates"] > 0 < times["augmentation"]
    named = ("data wait", "host gaps", "gates", "augmentation")
    assert all(time == 0 for name, time in times.items() if name not in named)
    first = time_by_category(events, 1, on_cuda=False)
    assert 20e3 <= first["data wait"] <= times["data wait"] - 20e3


def test_backward_operators_have_the_category_of_their_forward() -> None:
    gating = MultiGating(16)
    features = [torch.randn(2, 16, 64, 64, requires_grad=True) for _ in range(3)]
    wanted = [*features, *gating.parameters()]

    def step() -> None:
        *outputs, weights = gating(features)
        with record_function("losses"):
            loss = sum(output.square().mean() for output in (*outputs, weights))
        torch.autograd.grad(loss, wanted)  # backward() would also accumulate

    events = record(step)
    categories = categorize(events)
    backward = [event for event in events if event.scope == 1 and event.sequence_nr >= 0]
    assert len(backward) > 40
    assert {categories[id(event)] for event in backward} == {"gates", "losses"}
    products = [event for event in events if event.name in ("aten::mm", "aten::bmm", "aten::addmm")]
    inside = [event for event in products if event.cpu_parent.scope == 1]
    assert len(products) > len(inside) > 0
    assert {categories[id(event)] for event in products} == {"gates"}
    times = time_by_category(events, 2, on_cuda=False)
    assert times["other"] < 0.02 * times["gates"]


def test_layers_have_their_categories_forward_and_backward() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    images = torch.randn(2, 3, 16, 16)
    events = record(lambda: layers(images).sum().backward())
    categories = categorize(events)
    for part, category in (
        ("convolution", "convolutions"),
        ("atch_?norm", "batch normalization"),
        ("relu|threshold|max_?pool", "other"),
    ):
        found = [event for event in events if re.search(part, event.name, re.IGNORECASE)]
        assert any("ackward" in event.name for event in found)
        assert {categories[id(event)] for event in found} == {category}


def event(
    name: str, start: float, end: float, mark: bool = False, parent: FunctionEvent | None = None
) -> FunctionEvent:
    made = FunctionEvent(0, name, 1, start, end, is_user_annotation=mark)
    if parent is not None:
        made.set_cpu_parent(parent)
        parent.append_cpu_child(made)
    return made


def kernel(start: float, end: float, launcher: FunctionEvent | None = None, mark: bool = False) -> FunctionEvent:
    if launcher is not None:
        launcher.append_kernel("kernel", 0, end - start)
    return FunctionEvent(0, "kernel", 7, start, end, device_type=DeviceType.CUDA, is_user_annotation=mark)


def test_cuda_time_is_that_of_the_kernels() -> None:
    """A hand-written step with kernels, and a second, unfinished step that does not count."""
    step = event("ProfilerStep*", 0, 100, mark=True)
    data = event("data", 0, 20, mark=True, parent=step)
    augmentation = event("augmentation", 4, 10, mark=True, parent=data)
    resize = event("aten::mul", 5, 9, parent=augmentation)
    convolution = event("aten::convolution", 20, 22, parent=step)
    addition = event("aten::add", 22, 24, parent=step)
    pause = event(PAUSE, 80, 100, mark=True, parent=step)
    validation = event("aten::convolution", 81, 85, parent=pause)
    unfinished = event("ProfilerStep*", 100, 120, mark=True)
    late = event("aten::add", 101, 102, parent=unfinished)
    own = [step, data, augmentation, resize, convolution, addition, pause, validation, unfinished, late]
    device = [
        kernel(0, 120, mark=True),  # regions also appear among device events
        kernel(6, 12, resize),  # ends after the augmentation, during the data wait
        kernel(30, 50, convolution),
        kernel(50, 60, addition),
        kernel(64, 68),  # no operator launched it
        kernel(82, 90, validation),
        kernel(102, 110, late),
    ]
    expected = dict.fromkeys(CATEGORIES, 0.0) | {"augmentation": 6, "convolutions": 20, "other": 14}
    expected |= {"data wait": 12, "host gaps": 80 - 40 - 12}  # 20 minus 6 of augmentation minus 2 of its kernel
    assert time_by_category([*own, *device], 1, on_cuda=True) == pytest.approx(expected)

    twin = kernel(30, 50, addition)  # overlaps the convolution on another stream; both share the time
    times = time_by_category([*own, *device, twin], 1, on_cuda=True)
    assert sum(times.values()) == pytest.approx(80)
    assert times["host gaps"] == pytest.approx(expected["host gaps"])
    assert times["convolutions"] == pytest.approx(20 * 40 / 60)

    with pytest.raises(profile.UserError, match="recorded no kernel"):
        time_by_category(own, 1, on_cuda=True)
