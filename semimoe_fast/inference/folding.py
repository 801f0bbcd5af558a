"""A copy of a model that predicts faster: batch normalization is in the convolutions, unused heads are gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from ..model import BatchNormReLU, SemiMoE, UpsamplingConv2d


class Block(nn.Sequential):
    """Layers in place of a ConvBlock or an UpsamplingBlock, of whose further arguments only `skip` has an effect."""

    def forward(self, x: Tensor, groups: int = 1, kernel: None = None, skip: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if skip is None else torch.cat([skip, y], 1)


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
    model = copy.deepcopy(model).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    for expert in model.experts:
        for blocks in (expert.encoder, expert.upsample, expert.decoder):
            for i, block in enumerate(blocks):
                blocks[i] = _fold(block)
    kept = [model.tasks.index(task) for task in tasks]
    model.gating.gates = nn.ModuleList(model.gating.gates[k] for k in kept)
    model.gating.heads = nn.ModuleList(model.gating.heads[k] for k in kept)
    model.tasks = tasks
    return model


def _fold(block: nn.Sequential) -> nn.Sequential:
    """A block whose convolutions have the batch normalization after them, which becomes a ReLU."""
    if isinstance(block, Block):  # folded already
        return block
    layers = list(block)
    result = Block()
    for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - scale * norm.running_mean.double()  # these convolutions have no bias of their own
        weight = convolution.weight.double() * scale[:, None, None, None]
        if isinstance(convolution, UpsamplingConv2d):
            (weight,) = F.fold_upsampling([weight])
            convolution = nn.ConvTranspose2d(*weight.shape[:2], 4, stride=2, padding=1, device="meta")
        convolution.weight, convolution.bias = (_constant(x, norm.weight.dtype) for x in (weight, bias))
        result.extend([convolution, nn.ReLU(inplace=True)])
    return result


def _constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype), requires_grad=False)
