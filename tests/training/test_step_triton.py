"""A step of the trainer with the Triton kernels, on a GPU or in Triton's interpreter, against portable PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from semimoe_fast import backend
from semimoe_fast.device import Precision
from semimoe_fast.ops import _triton
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WHY_NOT = _triton.why_unavailable(DEVICE.type)
pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), *([] if CUDA else [pytest.mark.slow])]


def gradients(config: TrainConfig, name: str, precision: Precision) -> Tensor:
    """All of the first step: later ones differ, because rounding decides the sign of a few numbers before ReLU."""
    with backend(name):
        trainer = Trainer(dataclasses.replace(config, precision=precision), load_data(config)[0], DEVICE)
        trainer.train_step(next(trainer.begin_epoch()))
    return torch.cat([parameter.grad.flatten() for parameter in trainer.objective.parameters()])


def test_step_of_the_kernels_has_the_gradients_of_portable_code(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, width=4, dropout=0.0, cuda_graph=False, device=str(DEVICE))
    expected = gradients(config, "portable", "fp32")
    assert (gradients(config, "fused", "fp32") - expected).norm() <= 1e-3 * expected.norm()
    if CUDA:  # the interpreter is slow, and multiplies the bits of bfloat16 numbers
        rounding = (gradients(config, "portable", "bf16") - expected).norm()
        assert (gradients(config, "fused", "bf16") - expected).norm() <= 2 * rounding
