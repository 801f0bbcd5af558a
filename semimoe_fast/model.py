"""Semi-MoE: three expert U-Nets, the multi-gating module that mixes their features, and the adaptive loss.

Source: arXiv 2509.13834. Published sizes: E = T = 3 experts and tasks, width C = 64, K = 2 mask classes; none of
them is fixed here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from . import functional as F

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)  # sides inside a U-Net are multiples of this


class Output(NamedTuple):
    """Predictions of SemiMoE for B images of H x W pixels. A task that no expert learns is None."""

    mask: Tensor | None  # gated mask logits (B, K, H, W)
    sdf: Tensor | None  # gated raw signed distance field (B, 1, H, W); tanh gives the field
    boundary: Tensor | None  # gated boundary logits (B, 2, H, W)
    own: tuple[Tensor, ...]  # each expert's own prediction, shaped as that of its task
    gate_weights: Tensor  # (B, T, E), softmax over the experts


class ExpertUNet(nn.Module):
    """U-Net of five levels: (B, in_channels, H, W) -> (feature (B, width, H, W), own prediction (B, out, H, W)).

    Any H and W: the image is padded by its border to multiples of 16 and the results are cropped back.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 2, width: int = 64) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(LEVELS)]
        down = list(pairwise([in_channels, *channels]))
        up = list(pairwise(reversed(channels)))
        self.encoder = nn.ModuleList(_double_conv(i, o) for i, o in down)
        self.upsample = nn.ModuleList(_up(i, o) for i, o in up)
        self.decoder = nn.ModuleList(_double_conv(i, o) for i, o in up)
        self.head = nn.Conv2d(width, out_channels, 1)
        initialize(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.head(features)

    def features(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, width, H, W), what the head and the multi-gate see."""
        height, width = images.shape[-2:]
        x = pad_to_stride(images)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), upsample(x)], 1))
        return x[..., :height, :width]


class UpsamplingConv2d(nn.Conv2d):
    """Nearest x2 upsampling and a 3x3 convolution of its result, (B, C, H, W) -> (B, O, 2H, 2W), in one.

    Of three neighbors in the upsampled image at least two are copies of one pixel. To add their weights beforehand
    makes a transposed convolution of 4x4 and stride 2 of it: 4 projections instead of 9, and no upsampled copy to keep.
    """

    def forward(self, x: Tensor) -> Tensor:
        by_column = _added_weights(self.weight.permute(3, 2, 1, 0))
        kernel = _added_weights(by_column.transpose(0, 1))  # (4, 4, C, O)
        return nn.functional.conv_transpose2d(x, kernel.permute(2, 3, 0, 1), self.bias, stride=2, padding=1)


def _added_weights(weights: Tensor) -> Tensor:
    """The weights (3, ...) along an axis, those added that meet the same pixel before it was doubled: (4, ...)."""
    before, here, after = weights
    return torch.stack([after, here + after, before + here, before])


class Gate(nn.Module):
    """Weights of the experts for one task: (B, D) feature means -> (B, E), D = experts x channels."""

    def __init__(self, features: int, num_experts: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, features // 2)
        self.attention = nn.Linear(features // 2, features // 2)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(features // 2, num_experts)

    def forward(self, means: Tensor) -> Tensor:
        hidden = self.linear1(means).relu()
        attended = hidden * self.attention(hidden).softmax(1)
        return self.linear2(self.dropout(attended)).softmax(1)


class MultiGating(nn.Module):
    """Mix the features of E experts, per image and per task, into T gated predictions.

    E tensors (B, channels, H, W) -> T tensors (B, O_k, H, W) and, last, gate_weights (B, T, E); O_k = head_channels[k].
    """

    def __init__(
        self, channels: int = 64, num_experts: int = 3, head_channels: Sequence[int] = (2, 1, 2), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(num_experts * channels, num_experts, dropout) for _ in head_channels)
        self.heads = nn.ModuleList(nn.Conv2d(channels, out, 1) for out in head_channels)
        initialize(self)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        means, projections, _ = self.projections(features)
        return self.mix(means, projections)

    def projections(
        self, features: Sequence[Tensor], own_heads: Sequence[nn.Conv2d] = ()
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Means (B, E, channels), projections (B, E, sum O_k, H, W), and the predictions of the experts' own heads."""
        own_weights, own_biases = [head.weight for head in own_heads], [head.bias for head in own_heads]
        with record_function("gates"):
            return F.project_experts(features, [head.weight for head in self.heads], own_weights, own_biases)

    def mix(self, means: Tensor, projections: Tensor) -> tuple[Tensor, ...]:
        """What `forward` gives, from what `projections` gives."""
        with record_function("gates"):
            weights = self.gate_weights(means)
            return *F.mix_projections(projections, weights, [head.bias for head in self.heads]), weights

    @torch.no_grad()
    def pseudo_labels(self, means: Tensor, projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels from the gated predictions: mask (B, H, W), sdf (B, 1, H, W), boundary (B, H, W); no gradient."""
        with record_function("gates"):
            return F.label_projections(projections, self.gate_weights(means), [head.bias for head in self.heads])

    def gate_weights(self, means: Tensor) -> Tensor:
        """(B, E, channels) -> (B, T, E), softmax over the experts, in the parameters' dtype whatever autocast says."""
        with torch.autocast(means.device.type, enabled=False):
            inputs = means.flatten(1).to(self.heads[0].weight.dtype)
            return torch.stack([gate(inputs) for gate in self.gates], 1)


class SemiMoE(nn.Module):
    """Experts and gating together: images (B, in_channels, H, W) -> Output, any H and W.

    num_classes: K, at least 2, the background among them. expert_tasks names what each expert learns, "mask", "sdf" or
    "boundary"; several experts may share a task. The gated tasks are the distinct ones, in the order of their first
    expert. Raises ValueError for fewer classes and for unknown tasks.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        width: int = 64,
        expert_tasks: Sequence[str] = ("mask", "sdf", "boundary"),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: give at least 2, the background is a class of its own")
        out_channels = {"mask": num_classes, "sdf": 1, "boundary": 2}
        if unknown := [task for task in expert_tasks if task not in out_channels]:
            raise ValueError(f"expert_tasks has {unknown[0]!r}: choose from {', '.join(out_channels)}")
        self.in_channels, self.num_classes, self.width = in_channels, num_classes, width
        self.expert_tasks = tuple(expert_tasks)
        self.tasks = tuple(dict.fromkeys(expert_tasks))
        self.experts = nn.ModuleList(ExpertUNet(in_channels, out_channels[task], width) for task in expert_tasks)
        self.gating = MultiGating(width, len(expert_tasks), [out_channels[task] for task in self.tasks])

    def forward(self, images: Tensor) -> Output:
        means, projections, own = self.run_experts(images)
        *gated, gate_weights = self.gating.mix(means, projections)
        predictions = dict(zip(self.tasks, gated, strict=True))
        return Output(predictions.get("mask"), predictions.get("sdf"), predictions.get("boundary"), own, gate_weights)

    def run_experts(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The experts and one pass over their features: what `MultiGating.projections` gives."""
        features = [expert.features(images) for expert in self.experts]
        return self.gating.projections(features, [expert.head for expert in self.experts])


class AdaptiveMultiObjectiveLoss(nn.Module):
    """sum over j of c_j exp(-s_j) L_j + regularizer exp(s_j), with one learned s_j (`log_vars`) per term."""

    def __init__(
        self, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4, initial: float = 1.0
    ) -> None:
        super().__init__()
        self.coefficients, self.regularizer = tuple(coefficients), regularizer
        self.log_vars = nn.Parameter(torch.full((len(self.coefficients),), float(initial)))

    def forward(self, terms: Tensor) -> Tensor:
        return F.adaptive_loss(terms, self.log_vars, self.coefficients, self.regularizer)


def pad_to_stride(images: Tensor) -> Tensor:
    """Repeat the lower and right border until both sides are multiples of 16."""
    bottom, right = (-images.shape[-2] % STRIDE, -images.shape[-1] % STRIDE)
    return nn.functional.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def initialize(module: nn.Module) -> None:
    """Kaiming-normal (fan-in) convolutions and linear layers with zero biases, BN weights ~ N(1, 0.02)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


def _conv(in_channels: int, out_channels: int) -> list[nn.Module]:
    """3x3 convolution, BN, ReLU. BN removes any bias the convolution could have, so it has none."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _up(in_channels: int, out_channels: int) -> nn.Sequential:
    """Nearest x2 upsampling, 3x3 convolution, BN, ReLU; the keys leave a 0 to the upsampling, which has no weights."""
    convolution = UpsamplingConv2d(in_channels, out_channels, 3, padding=1, bias=False)
    layers = (convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict((str(key), layer) for key, layer in enumerate(layers, 1)))


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv(in_channels, out_channels), *_conv(out_channels, out_channels))
