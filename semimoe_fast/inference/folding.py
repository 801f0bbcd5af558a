"""A copy of a model that predicts faster: batch normalization is in the convolutions, unused heads are gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model import BatchNormReLU, ConvBlock, SemiMoE, UpsamplingConv2d, upsampling_kernel


class ReLU(nn.ReLU):
    """ReLU in place of BatchNormReLU: it takes the number of groups, which has no effect in evaluation."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        return super().forward(x)


def folded(model: SemiMoE, tasks: Sequence[str] | None = None) -> SemiMoE:
    """A copy of a model in eval mode, channels-last, whose ConvBlocks are convolutions with bias and ReLUs.

    Its predictions equal those of model.eval() up to rounding (1e-5 in probabilities). tasks: the gated predictions to
    keep, of model.tasks; the copy makes no others. A model that is folded already and has these tasks is returned as it
    is. The copy only predicts: it cannot be trained, nor take the weights of a checkpoint. Raises ValueError for a task
    without an expert.
    """
    tasks = model.tasks if tasks is None else tuple(tasks)
    if missing := [task for task in tasks if task not in model.tasks]:
        raise ValueError(f"the model has no expert for {missing[0]!r}, its experts learn {', '.join(model.tasks)}")
    if tasks == model.tasks and not any(isinstance(layer, BatchNormReLU) for layer in model.modules()):
        return model
    model = copy.deepcopy(model).requires_grad_(False).eval()
    for block in [layer for layer in model.modules() if isinstance(layer, ConvBlock)]:
        _fold(block)
    kept = [model.tasks.index(task) for task in tasks]
    model.gating.gates = nn.ModuleList(model.gating.gates[k] for k in kept)
    model.gating.heads = nn.ModuleList(model.gating.heads[k] for k in kept)
    model.tasks = tasks
    return model.to(memory_format=torch.channels_last)


def _fold(block: ConvBlock) -> None:
    """Give each convolution of a block the batch normalization after it, which becomes a ReLU."""
    names = list(block._modules)
    for first, second in zip(names[::2], names[1::2], strict=True):
        convolution, norm = block._modules[first], block._modules[second]
        if not isinstance(norm, BatchNormReLU):  # folded already
            continue
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - scale * norm.running_mean.double()  # these convolutions have no bias of their own
        weight = convolution.weight.double() * scale[:, None, None, None]
        if isinstance(convolution, UpsamplingConv2d):
            weight = upsampling_kernel(weight)
            convolution = nn.ConvTranspose2d(*weight.shape[:2], 4, stride=2, padding=1, device="meta")
        convolution.weight, convolution.bias = (_constant(x, norm.weight.dtype) for x in (weight, bias))
        block._modules[first], block._modules[second] = convolution, ReLU(inplace=True)


def _constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype), requires_grad=False)
