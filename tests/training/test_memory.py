"""Memory that the forward pass saves for the backward pass; with the weights, it is the memory of a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.device import Precision
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

baseline = pytest.importorskip("benchmarks.baseline", reason="needs the source tree, and tests run from its root")

CPU = torch.device("cpu")


def config(batch: int, precision: Precision = "fp32") -> TrainConfig:
    return TrainConfig(
        synthetic=(batch, batch, 1),
        labeled_batch=batch,
        unlabeled_batch=batch,
        image_size=32,
        width=16,
        precision=precision,
        normalization="glas",
    )


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd saves during a call, without the parameters."""
    storages: dict[int, torch.UntypedStorage] = {}  # referenced, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


def bytes_of_ours(batch: int, precision: Precision) -> int:
    trainer = Trainer(config(batch, precision), load_data(config(batch))[0], CPU)
    (images,) = trainer.begin_epoch()
    return saved_bytes(lambda: trainer.train_step(images))


def bytes_of_baseline(batch: int) -> int:
    trainer = baseline.Baseline(config(batch), CPU)
    mask = torch.zeros(batch, 32, 32, dtype=torch.uint8)
    images = torch.randn(batch, 3, 32, 32)
    return saved_bytes(lambda: trainer.step(baseline.Batch(images, (mask, *F.distance_targets(mask)), images)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_linear_in_the_batch(precision: Precision) -> None:
    two, four, eight = (bytes_of_ours(batch, precision) for batch in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)


def test_memory_per_image_is_below_the_published_trainer() -> None:
    """The difference of two batch sizes leaves out saved weights, which do not depend on the batch."""
    published = bytes_of_baseline(8) - bytes_of_baseline(4)
    assert bytes_of_ours(8, "bf16") - bytes_of_ours(4, "bf16") < 0.45 * published
    assert bytes_of_ours(8, "fp32") - bytes_of_ours(4, "fp32") < 0.85 * published
