"""Memory that the forward pass keeps for the backward pass, against the published trainer's; the cost of --recompute.

    python -m benchmarks.memory                 # two Markdown tables

With weights, gradients and moments, it is the memory of a step. It is counted on a CPU for 32 x 32 pixels, as bytes an
image: the difference of two batch sizes leaves out what does not depend on the batch, such as weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from semimoe_fast import functional as F
from semimoe_fast.device import Precision
from semimoe_fast.options import read_options
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

from .baseline import Baseline, Batch
from .step_ratios import ON_CPU, Case, interleave, ours, ratio

SIZE = 32
CPU = torch.device("cpu")


def kept_by_ours(batch: int, precision: Precision, recompute: bool = False) -> int:
    """Bytes that a step of `batch` labeled and as many unlabeled images keeps."""
    config = _config(batch, precision=precision, recompute=recompute)
    trainer = Trainer(config, load_data(config)[0], CPU)
    (images,) = trainer.begin_epoch()
    return kept_bytes(lambda: trainer.train_step(images))


def kept_by_baseline(batch: int) -> int:
    """The same of the published trainer, which computes in fp32."""
    trainer = Baseline(_config(batch), CPU)
    mask = torch.zeros(batch, SIZE, SIZE, dtype=torch.uint8)
    images = torch.randn(batch, 3, SIZE, SIZE)
    return kept_bytes(lambda: trainer.step(Batch(images, (mask, *F.distance_targets(mask)), images)))


def _config(batch: int, **options: Any) -> TrainConfig:
    return TrainConfig(
        synthetic=(batch, batch, 1),
        labeled_batch=batch,
        unlabeled_batch=batch,
        image_size=SIZE,
        width=16,
        normalization="glas",
        **options,
    )


def kept_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd keeps during a call, without the parameters."""
    with _kept_storages() as storages:
        step()
    return sum(storage.nbytes() for storage in storages.values())


@contextlib.contextmanager
def _kept_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The memory of all that autograd keeps in the block, by address; hooks inside of the block may replace tensors."""
    storages: dict[int, torch.UntypedStorage] = {}  # referenced, so that no address is used twice

    class Hooks(saved_tensors_hooks):
        def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
            def count(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if not isinstance(tensor, torch.nn.Parameter):
                    kept = [leaf.untyped_storage() for leaf in tree_leaves(packed) if isinstance(leaf, Tensor)]
                    storages.update((storage.data_ptr(), storage) for storage in kept)
                return packed

            super().__init__(count, unpack)

    with mock.patch("torch.autograd.graph.saved_tensors_hooks", Hooks), Hooks(lambda kept: kept, lambda kept: kept):
        yield storages


def kept() -> Iterator[str]:
    """Rows of the table: bytes an image relative to the baseline's."""
    baseline = kept_by_baseline(8) - kept_by_baseline(4)
    for precision in ("bf16", "fp32"):
        shares = [
            (kept_by_ours(8, precision, recompute) - kept_by_ours(4, precision, recompute)) / baseline
            for recompute in (False, True)
        ]
        yield f"| {precision} | {' | '.join(f'{share:.3f}' for share in shares)} |"


def cost(case: Case, rounds: int) -> str:
    """A row of the table: the processor's time, which other programs disturb less than wall time, and the ratio."""
    providers = {"without": ours(case), "with": ours(case, recompute=True)}
    seconds = interleave(providers, rounds, time.process_time)
    medians = [f"{1e3 * statistics.median(times):.4g}" for times in seconds.values()]
    return f"| {case} | {' | '.join(medians)} | {ratio(seconds['with'], seconds['without']):.3f} |"


@dataclasses.dataclass(frozen=True)
class Options:
    """Count the memory kept for the backward pass, measure steps with and without --recompute in turn; print tables."""

    rounds: int = 31
    """Number of rounds after the warm-up."""


def main(options: Options) -> None:
    torch.set_num_threads(1)  # so that the processor's time is the time of a step
    print("| kept for the backward pass / baseline's | default | --recompute |\n| --- | --- | --- |")
    for row in kept():
        print(row, flush=True)
    print("\n| step, one thread | CPU ms | CPU ms with --recompute | with / without |\n| --- | --- | --- | --- |")
    print(cost(ON_CPU[0], options.rounds))


if __name__ == "__main__":
    main(read_options(Options, "benchmarks.memory"))
