"""`--profile`: a table of where the time of a training step goes, and a Chrome trace in the run folder.

Trainer, model and objective mark regions of the step with `torch.profiler.record_function`, which costs almost nothing
without a profiler. On the CPU, the time of a category is that of its operators; on CUDA, that of the kernels that its
operators launch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from ..errors import UserError
from .speed import peak_memory_bytes
from .trainer import Trainer

WARM_UP, STEPS = 3, 5  # steps before the recording, and recorded steps
TRACE_FILE = "trace.json.gz"

# Names of the marked regions -> names in the table. Optimizers mark their own regions.
REGIONS = {name: name for name in ("augmentation", "targets", "gates", "losses")} | {"data": "data wait"}
PAUSE = "between epochs"  # region of validation and saving, which belong to no step
OPERATORS = {r"conv\dd|convolution": "convolutions", "batch_norm|BatchNorm": "batch normalization"}
OPTIMIZER, OTHER, GAPS = "optimizer", "other", "host gaps"
CATEGORIES = (*REGIONS.values(), *OPERATORS.values(), OPTIMIZER, OTHER, GAPS)


class StepProfile:
    """Context that profiles steps of a run, which calls `step` after each of them; `wanted=False` turns it off.

    Profiling does not change the results of the run, and its errors do not end the run.
    """

    def __init__(self, trainer: Trainer, folder: Path, wanted: bool = True) -> None:
        self.trainer, self.folder = trainer, folder
        self.steps = 0
        self.profiler = None
        if wanted:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_cuda
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._finish, acc_events=True)

    def __enter__(self) -> StepProfile:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Print the table of fewer steps if the run ends before all steps are recorded."""
        if self.profiler is not None:
            self.profiler.stop()
            if self.steps <= WARM_UP:
                tqdm.write(f"--profile: nothing to show after {self.steps} steps; the first {WARM_UP} are the warm-up")

    def step(self) -> None:
        """Call after every step."""
        if self.profiler is None:
            return
        self.steps += 1
        epoch_ends = self.trainer.step == self.trainer.steps_per_epoch
        if self._on_cuda and (epoch_ends or self.steps in (WARM_UP, WARM_UP + STEPS)):
            torch.cuda.synchronize(self.trainer.device)  # kernels must finish inside the recording of their step
        self.profiler.step()
        if self.steps == WARM_UP + STEPS:
            self.profiler.stop()
            self.profiler = None

    @property
    def _on_cuda(self) -> bool:
        return self.trainer.device.type == "cuda"

    def _finish(self, profiler: profile) -> None:
        steps = self.steps - WARM_UP
        if steps < 1:
            return
        try:
            profiler.export_chrome_trace(str(self.folder / TRACE_FILE))
            text = self._table(time_by_category(profiler.events(), steps, self._on_cuda), steps)
        except Exception as error:  # no profiling error may end a run
            text = f"--profile: no result ({type(error).__name__}: {error}); the run goes on"
        tqdm.write(text)

    def _table(self, times: dict[str, float], steps: int) -> str:
        """The printed table. times: microseconds per category, over `steps` steps."""
        trainer = self.trainer
        total = sum(times.values())
        seconds = total / steps / 1e6
        flops = trainer.flops / trainer.world.size
        memory = peak_memory_bytes(trainer.device) / 2**30
        device = (
            torch.cuda.get_device_name(trainer.device) if self._on_cuda else f"CPU, threads: {torch.get_num_threads()}"
        )
        fewer = "" if steps == STEPS else " (the run had no more)"
        rows = [*sorted(times.items(), key=lambda row: -row[1]), ("step", total)]
        lines = [f"mean of {steps} steps{fewer} after {WARM_UP} of warm-up; the profiler's own cost is included"]
        lines.append(f"{'':<22}{'ms a step':>10}{'share':>9}")
        lines += [f"{name:<22}{time / steps / 1000:10.2f}{time / total:9.1%}" for name, time in rows]
        lines.append(f"{trainer.config.images_per_step / seconds:.1f} images/s, {flops / seconds / 1e12:.3g} TFLOP/s")
        lines.append(f"peak memory {memory:.2f} GiB; {device}")
        if self._on_cuda:
            lines.append("host gaps are those of eager steps: a profiled run does not use a CUDA graph")
        lines.append(f"trace: {self.folder / TRACE_FILE}, opens in https://ui.perfetto.dev")
        return "\n".join(lines)


def time_by_category(events: Sequence[FunctionEvent], steps: int, on_cuda: bool) -> dict[str, float]:
    """Microseconds per category over the first `steps` recorded steps; the sum is the wall-clock time of these steps.

    "data wait" is idle time in the region "data" but outside its subregions; "host gaps" is all other idle time. Idle
    means that no operator runs (CPU) or no kernel runs (CUDA).
    """
    own = [event for event in events if event.device_type == DeviceType.CPU]
    recorded = [event for event in own if event.name.startswith("ProfilerStep")][:steps]
    if not on_cuda:
        return _on_host(own, recorded)
    return _on_device(own, [event for event in events if event.device_type != DeviceType.CPU], recorded)


def categorize(events: Iterable[FunctionEvent]) -> dict[int, str]:
    """id(event) -> category of each CPU event: of the innermost region around it, else by its operator's name.

    Backward nodes run outside all regions, possibly in another thread. A node has the sequence number of its forward
    operator, the last one that started with this number, and gets the category of that operator.
    """
    categories: dict[int, str] = {}
    by_sequence: dict[int, str] = {}
    for event in events:  # sorted by start, parents before children
        category = categories.get(id(event.cpu_parent), OTHER)
        if event.is_user_annotation:
            category = OPTIMIZER if event.name.startswith("Optimizer.") else REGIONS.get(event.name, category)
        elif category == OTHER and event.name.startswith("autograd::engine::evaluate_function"):
            category = by_sequence.get(event.sequence_nr, OTHER)
        elif category == OTHER:
            category = next((found for name, found in OPERATORS.items() if re.search(name, event.name)), OTHER)
        categories[id(event)] = category
        if event.sequence_nr >= 0:
            by_sequence[event.sequence_nr] = category
    return categories


def _on_host(own: Sequence[FunctionEvent], recorded: Sequence[FunctionEvent]) -> dict[str, float]:
    """CPU: microseconds per category of the events in the thread of the steps, each without its children."""
    categories, times = categorize(own), dict.fromkeys(CATEGORIES, 0.0)
    pending = list(recorded)
    while pending:
        event = pending.pop()
        if event.name == PAUSE:
            continue
        pending += event.cpu_children
        category = categories[id(event)]
        if event.is_user_annotation and category not in (OPTIMIZER, REGIONS["data"]):
            category = GAPS  # inside a region, outside its operators
        times[category] += event.self_cpu_time_total
    return times


def _on_device(
    own: Sequence[FunctionEvent], device: Sequence[FunctionEvent], recorded: Sequence[FunctionEvent]
) -> dict[str, float]:
    """CUDA: microseconds per category of the kernels, by the operator that launched them, and of idle time."""
    categories, times = categorize(own), dict.fromkeys(CATEGORIES, 0.0)
    kernels = [event for event in device if not event.is_user_annotation]
    if not kernels:
        raise UserError("torch.profiler recorded no kernel; stop other profilers that use the device")
    busy = _union((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)
    pauses = [event for event in own if event.name == PAUSE and _within(event, recorded)]

    def counts(event: FunctionEvent) -> bool:
        return _within(event, recorded) and not _within(event, pauses)

    def idle(ranges: Iterable[FunctionEvent]) -> float:
        ends = [(event.time_range.start, event.time_range.end) for event in ranges]
        return sum(end - start - _overlap(start, end, busy) for start, end in ends)

    for event in filter(counts, own):
        times[categories[id(event)]] += sum(kernel.duration for kernel in event.kernels)
    times[OTHER] += max(
        0.0, sum(map(_elapsed, filter(counts, kernels))) - sum(times.values())
    )  # no operator launched them
    gaps = idle(recorded) - idle(pauses)
    running = sum(map(_elapsed, recorded)) - sum(map(_elapsed, pauses)) - gaps
    scale = running / (sum(times.values()) or 1.0)  # below 1 if kernels overlap on several streams
    times = {category: time * scale for category, time in times.items()}
    data = [event for event in own if event.name == "data" and counts(event)]
    inside = [child for event in data for child in event.cpu_children if child.is_user_annotation]
    times[REGIONS["data"]] += (wait := idle(data) - idle(inside))
    times[GAPS] += gaps - wait
    return times


def _elapsed(event: FunctionEvent) -> float:
    return event.time_range.end - event.time_range.start


def _within(event: FunctionEvent, ranges: Iterable[FunctionEvent]) -> bool:
    return any(r.time_range.start <= event.time_range.start < r.time_range.end for r in ranges)


def _union(ranges: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of time ranges, as sorted disjoint ranges."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(ranges):
        if union and start <= union[-1][1]:
            start, end = union[-1][0], max(union.pop()[1], end)
        union.append((start, end))
    return union


def _overlap(start: float, end: float, ranges: Iterable[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, last) - max(start, first)) for first, last in ranges)
