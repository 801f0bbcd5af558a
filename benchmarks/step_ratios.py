"""One training step: the published trainer, ours, and the bare U-Nets, in turn within one process.

    python -m benchmarks.step_ratios            # a Markdown table of medians and ratios, and one of the habits
    make bench ARGS="-k step"                   # the same providers under pytest-benchmark

On a shared machine set GOMP_SPINCOUNT=10000: threads that spin long at barriers slow down other programs.

A round is one step of each provider, one after the other, so that other load on the machine affects all of them. On a
GPU it is ten steps of each between two synchronizations, because a training run does not wait for the device after a
step, and ours and bare have rounds of their own, because the baseline empties the cache of GPU memory in every step. A
ratio is computed within each round; the table has the medians over the rounds.

- baseline: benchmarks.baseline with all its habits, with two loader workers
- ours: semimoe_fast.training.trainer.Trainer as a run configures it, augmentation and targets included
- bare: only forward and backward of the three U-Nets on both batches, in the precision and layout of ours
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semimoe_fast.device import autocast, configure
from semimoe_fast.model import SemiMoE
from semimoe_fast.objective import objective
from semimoe_fast.options import read_options
from semimoe_fast.synthetic import Folder, write
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

from .baseline import Baseline, Batch, Habits, clock

IMAGES = {"labeled": 17, "unlabeled": 68, "val": 1}  # as in GlaS
STEPS_ON_CUDA = 10  # per round; ours captures its graph within them, so that one warm-up round suffices
WARM_UP_ROUNDS = 1
EPOCH = 1  # in epoch 0 the learning rate is 0
HABITS = [field.name for field in dataclasses.fields(Habits)]
Round = Callable[[], object]  # runs `Case.steps` steps


@dataclasses.dataclass(frozen=True)
class Case:
    width: int
    size: int
    batch: int  # labeled images, and as many unlabeled ones
    device: str

    def __str__(self) -> str:
        return f"width {self.width}, {2 * self.batch} x {self.size} x {self.size}, {self.device}"

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return STEPS_ON_CUDA if self.device == "cuda" else 1

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            data=images_of_size(self.size),
            image_size=self.size,
            normalization="glas",
            width=self.width,
            labeled_batch=self.batch,
            unlabeled_batch=self.batch,
            device=self.device,
        )


ON_CPU = [Case(width, size, 2, "cpu") for width in (16, 32) for size in (128, 256)]
ON_CUDA = [Case(64, 256, batch, "cuda") for batch in (2, 8)]
CASES = [*ON_CPU, *(ON_CUDA if torch.cuda.is_available() else [])]


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="glands-")


@functools.cache
def images_of_size(size: int) -> Path:
    """A folder of synthetic glands, which is deleted when the process ends."""
    folder = Path(scratch().name) / str(size)
    write(Folder(folder, **IMAGES, size=size))
    return folder


# --------------------------------------------------------------------------------------------------------- providers


@contextlib.contextmanager
def baseline(case: Case, habits: Habits | None = None) -> Iterator[Round]:
    trainer = Baseline(case.config, torch.device(case.device), habits, EPOCH)
    batches = trainer.batches(case.config.data, workers=2)

    def steps() -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # PyTorch's defaults
        trainer.train(batches, case.steps)

    try:
        yield steps
    finally:
        batches.close()  # ends the workers


@contextlib.contextmanager
def ours(case: Case, **options: Any) -> Iterator[Round]:
    device = torch.device(case.device)
    config = dataclasses.replace(case.config, steps_per_epoch=case.steps, **options)
    trainer = Trainer(config, load_data(config)[0], device)

    def steps() -> None:
        configure(device, config.precision, config.deterministic)
        trainer.epoch, trainer.step = EPOCH, 0
        trainer.train_epoch(stop=lambda: False, progress=lambda: None)

    yield steps


@contextlib.contextmanager
def bare(case: Case) -> Iterator[Round]:
    device, layout = torch.device(case.device), torch.channels_last
    model = SemiMoE(width=case.width).to(device, memory_format=layout).train()
    shape = (2, case.batch, 3, case.size, case.size)
    images = [batch.contiguous(memory_format=layout) for batch in torch.randn(shape, device=device)]

    def predictions() -> list[Tensor]:
        with autocast(case.config.precision, device):
            return [expert(batch)[1] for batch in images for expert in model.experts]

    with torch.no_grad():
        grad_output = [torch.randn_like(prediction) for prediction in predictions()]

    def steps() -> None:
        configure(device, case.config.precision, case.config.deterministic)
        for _ in range(case.steps):
            model.zero_grad()
            torch.autograd.backward(predictions(), grad_output)

    yield steps


PROVIDERS = {"baseline": baseline, "ours": ours, "bare": bare}


def check(case: Case, habits: Habits | None = None) -> None:
    """Check that the baseline and ours compute the same losses and gradients of one batch."""
    device = torch.device(case.device)
    config = dataclasses.replace(case.config, dropout=0.0, width=4, precision="fp32")
    configure(device, config.precision, config.deterministic)
    trainer, reference = Trainer(config, load_data(config)[0], device), Baseline(config, device, habits, EPOCH)
    trainer.epoch = EPOCH
    trainer.model.train()
    reference.networks.load_state_dict(trainer.model.state_dict(), strict=False)  # the biases of its convolutions are 0
    batch = next(Baseline(config, torch.device("cpu")).batches(config.data, workers=0))
    images, unlabeled = (reference.to_device(b) for b in (batch.images, batch.unlabeled))
    targets = tuple(target.to(device) for target in batch.targets)
    losses = reference.step(Batch(images, targets, unlabeled))
    expected = objective(trainer.model, trainer.adaptive, images, targets, unlabeled, trainer.unsupervised_weight)
    expected.total.backward()
    for name, value in losses._asdict().items():
        # pseudo-labels may differ if two outputs are almost equal
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reference.log_vars.grad, trainer.adaptive.log_vars.grad, rtol=1e-3, atol=1e-4)


def versions() -> dict[str, object]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ------------------------------------------------------------------------------------------------------------ rounds


def interleave(
    providers: Mapping[str, contextlib.AbstractContextManager[Round]], rounds: int, timer: Callable[[], float] = clock
) -> dict[str, list[float]]:
    """Seconds of every round by provider, without the warm-up rounds."""
    with contextlib.ExitStack() as stack:
        entered = {name: stack.enter_context(provider) for name, provider in providers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in entered}
        for _ in range(WARM_UP_ROUNDS + rounds):
            for name, steps in entered.items():
                start = timer()
                steps()
                seconds[name].append(timer() - start)
    del entered, steps
    gc.collect()  # a trainer and its CUDA graph refer to each other
    return {name: times[WARM_UP_ROUNDS:] for name, times in seconds.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(case: Case, rounds: int) -> str:
    """A row of the table: milliseconds per step, images per second, ratios."""
    check(case)
    groups = (("baseline", "ours"), ("ours", "bare")) if case.device == "cuda" else (tuple(PROVIDERS),)
    measured = [interleave({name: PROVIDERS[name](case) for name in group}, rounds) for group in groups]
    beside_baseline, beside_bare = measured[0], measured[-1]
    seconds = beside_bare | beside_baseline
    medians = {name: statistics.median(seconds[name]) / case.steps for name in PROVIDERS}
    rates = [f"{2 * case.batch / medians[name]:.3g}" for name in ("baseline", "ours")]
    ratios = [ratio(beside_baseline["baseline"], beside_baseline["ours"])]
    ratios += [ratio(beside_bare["ours"], beside_bare["bare"])]
    cells = [str(case), *(f"{1e3 * s:.4g}" for s in medians.values()), *rates, *(f"{r:.2f}" for r in ratios)]
    return f"| {' | '.join(cells)} |"


def ablate(case: Case, rounds: int) -> Iterator[str]:
    """For every habit, the ratio of the step's time with all habits to its time without this habit.

    On a CPU, empty_cache and untuned_cudnn have no effect, so the deviation of their ratios from 1 is noise.
    """
    for habit in HABITS:
        habits = Habits(**{habit: False})
        check(case, habits)
        seconds = interleave({"with": baseline(case), "without": baseline(case, habits)}, rounds)
        yield f"| {habit} | {ratio(seconds['with'], seconds['without']):.3f} |"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the training steps in interleaved rounds and print Markdown tables."""

    rounds: int = 5
    """Number of rounds after the warm-up."""
    threads: int = 2
    only_cuda: bool = False
    """Skip the cases of the CPU."""
    ablation: bool = True
    """Also measure the baseline without each of its habits, in the first case."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    print(", ".join(f"{key} {value}" for key, value in versions().items()), "\n")
    print(
        "| step | baseline ms | ours ms | bare ms | baseline images/s | ours images/s | baseline / ours | ours / bare |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in ON_CUDA if options.only_cuda else CASES:
        print(compare(case, options.rounds), flush=True)
    if options.ablation:
        print(f"\n| habit, {CASES[0]} | with / without |\n| --- | --- |")
        for row in ablate(CASES[0], options.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main(read_options(Options, "benchmarks.step_ratios"))
