"""Semi-MoE: three expert U-Nets, the multi-gating module that mixes their features, and the adaptive loss.

Source: arXiv 2509.13834. The published network has E = T = 3 experts and tasks, width C = 64 and K = 2 mask classes;
here all of them are arguments.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from . import functional as F
from .ops.skips import pool_and_skip

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)  # a U-Net pads both sides of an image to multiples of this
FOLDED_PIXELS = 256  # see `folds_upsampling`


class Output(NamedTuple):
    """Predictions of SemiMoE for B images of H x W pixels. A task without an expert is None."""

    mask: Tensor | None  # gated mask logits (B, K, H, W)
    sdf: Tensor | None  # gated raw signed distance field (B, 1, H, W); tanh gives the field
    boundary: Tensor | None  # gated boundary logits (B, 2, H, W)
    own: tuple[Tensor, ...]  # each expert's own prediction, with the shape of its task
    gate_weights: Tensor  # (B, T, E), softmax over the experts


class Projected(NamedTuple):
    """Everything that the gating needs from the experts' features, read in one pass over them."""

    means: Tensor  # of the features over the pixels (B, E, C)
    projections: Tensor  # all heads applied to each expert's features (B, E, sum O_k, H, W)


class ExpertUNet(nn.Module):
    """U-Net of five levels: (B, in_channels, H, W) -> (features (B, width, H, W), own prediction (B, out, H, W)).

    H and W are arbitrary: the border of the image is repeated up to multiples of 16, and the results are cropped.
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

    def forward(self, images: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        features = self.features(images, groups)
        return features, self.head(features)

    def features(self, images: Tensor, groups: int = 1, kernels: Sequence[Tensor | None] | None = None) -> Tensor:
        """(B, in_channels, H, W) -> features (B, width, H, W), the input of the head and of the multi-gate.

        In training each of `groups` equal runs of consecutive images has batch statistics of its own.
        kernels: those of `upsampling_kernels` for this expert; None computes them here.
        """
        height, width = images.shape[-2:]
        return self.decode(self.encode(pad_to_stride(images), groups), groups, kernels)[..., :height, :width]

    def encode(self, images: Tensor, groups: int = 1) -> list[Tensor]:
        """Features of each level: images (B, in_channels, H, W) -> (B, 2^l width, H / 2^l, W / 2^l) for l = 0 .. 4.

        H and W are multiples of 16.
        """
        x, features = images, []
        for level, block in enumerate(self.encoder):
            if level:
                x, features[-1] = pool_and_skip(x)
            x = block(x, groups)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], groups: int = 1, kernels: Sequence[Tensor | None] | None = None) -> Tensor:
        """The last decoder feature (B, width, H, W) from those of `encode`; empties their list to free memory."""
        if kernels is None:
            (kernels,) = upsampling_kernels([self], features[0])
        x = features.pop()
        for upsample, kernel, block in zip(self.upsample, kernels, self.decoder, strict=True):
            x = block(upsample(x, groups, kernel, features.pop()), groups)
        return x


class BatchNormReLU(nn.BatchNorm2d):
    """Batch normalization and ReLU: (B, C, H, W) -> (B, C, H, W), or the concatenation of `skip` and that.

    In training each of `groups` equal runs of consecutive images is normalized with its own statistics, as if it were a
    call of its own. The caller counts the batches (`num_batches_tracked`). For SyncBN use
    `training.distributed.World.synchronize_batch_norm`, not nn.SyncBatchNorm's conversion.
    """

    def forward(self, x: Tensor, groups: int = 1, skip: Tensor | None = None) -> Tensor:
        return F.batch_norm_relu(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.momentum,
            self.eps,
            groups,
            self.training,
            skip,
        )


class ConvBlock(nn.Sequential):
    """Convolutions, each followed by BN and ReLU: (B, C, H, W) -> (B, O, H', W')."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        layers = iter(self)
        for convolution, norm in zip(layers, layers, strict=True):
            x = norm(convolution(x), groups)
        return x


class UpsamplingBlock(nn.Sequential):
    """UpsamplingConv2d, BN and ReLU: (B, C, H, W) -> (B, O, 2H, 2W), or the concatenation of `skip` and that."""

    def forward(self, x: Tensor, groups: int = 1, kernel: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        convolution, norm = self
        return norm(convolution(x, kernel), groups, skip)


class UpsamplingConv2d(nn.Conv2d):
    """Nearest x2 upsampling followed by a 3x3 convolution: (B, C, H, W) -> (B, O, 2H, 2W).

    With the kernel (C, O, 4, 4) from `F.fold_upsampling([weight])` it is one transposed convolution, which computes 4
    products per output pixel instead of 9, and whose backward pass needs no upsampled image.
    """

    def forward(self, x: Tensor, kernel: Tensor | None = None) -> Tensor:
        if kernel is None:
            return super().forward(nn.functional.interpolate(x, scale_factor=2))
        return nn.functional.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def folds_upsampling(device_type: str, pixels: int) -> bool:
    """Whether an upsampling convolution of B h w input pixels computes faster with folded weights than plainly.

    On a CPU always. On a GPU from 256 pixels on; this number is a prediction for an H100 in bfloat16, not measured. Per
    pair of input and output channel, folding moves 136 bytes forward and backward: 45 ps at 3 TB/s. Without it, forward
    pass and both gradients compute 3 (4 x 9 - 16) = 60 multiply-adds more per pixel: 0.35 ps at 340 TFLOP/s, the mean
    predicted for the convolutions of a step at width 64, and 0.18 ps at twice that rate. So the costs are equal at 128
    to 256 pixels. The upsampled image adds little, because all output channels share it.
    """
    return device_type != "cuda" or pixels >= FOLDED_PIXELS


def upsampling_kernels(experts: Sequence[ExpertUNet], images: Tensor) -> list[list[Tensor | None]]:
    """Kernels for the upsampling convolutions of each expert, which takes images (B, in_channels, H, W).

    One operation folds the weights of all levels and experts, under autocast into its dtype. A level that is computed
    plainly (`folds_upsampling`), or by another block (`inference.folding`), has None.
    """
    device = images.device.type
    batch, _, height, width = images.shape
    pixels = [batch * math.ceil(height / STRIDE) * math.ceil(width / STRIDE) * 4**i for i in range(LEVELS - 1)]
    folds = [folds_upsampling(device, number) for number in pixels]
    weights = [
        up[0].weight if fold and isinstance(up, UpsamplingBlock) else None
        for expert in experts
        for up, fold in zip(expert.upsample, folds, strict=True)
    ]
    folded = iter(F.fold_upsampling([weight for weight in weights if weight is not None], _autocast_dtype(images)))
    kernels = iter([None if weight is None else next(folded) for weight in weights])
    return [[next(kernels) for _ in folds] for _ in experts]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of convolutions of x under autocast; None where they keep that of x."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # torch refuses to ask "meta"
        return None
    return torch.get_autocast_dtype(device)


class Gate(nn.Module):
    """The layers of the gate of one task. `MultiGating.gate_weights` applies those of all tasks together.

    features: D = experts x channels.
    """

    def __init__(self, features: int, num_experts: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, features // 2)
        self.attention = nn.Linear(features // 2, features // 2)
        self.linear2 = nn.Linear(features // 2, num_experts)


class MultiGating(nn.Module):
    """Mix the features of E experts, per image and per task, into T gated predictions.

    Features, E tensors (B, channels, H, W), or their `Projected` -> T tensors (B, O_k, H, W) and, last, gate_weights
    (B, T, E), where O_k = head_channels[k]. The heads are applied together in one operation, so hooks on single heads
    do not fire, nor those of torch.nn.utils.prune; parametrizations (torch.nn.utils.parametrize) work. The same
    goes for the layers of the gates.
    """

    def __init__(
        self, channels: int = 64, num_experts: int = 3, head_channels: Sequence[int] = (2, 1, 2), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(num_experts * channels, num_experts) for _ in head_channels)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Conv2d(channels, out, 1) for out in head_channels)
        initialize(self)

    def forward(self, features: Sequence[Tensor] | Projected) -> tuple[Tensor, ...]:
        if isinstance(features, Projected):
            return self.mix(*features)
        means, projections, _ = self.projections(features)
        return self.mix(means, projections)

    def projections(
        self, features: Sequence[Tensor], own_heads: Sequence[nn.Conv2d] = ()
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Means (B, E, channels), projections (B, E, sum O_k, H, W) and predictions of the experts' own heads."""
        own_weights, own_biases = [head.weight for head in own_heads], [head.bias for head in own_heads]
        with record_function("gates"):
            return F.project_experts(features, [head.weight for head in self.heads], own_weights, own_biases)

    def mix(self, means: Tensor, projections: Tensor) -> tuple[Tensor, ...]:
        """The result of `forward`, from the means and projections that `projections` returns."""
        with record_function("gates"):
            weights = self.gate_weights(means)
            return *F.mix_projections(projections, weights, [head.bias for head in self.heads]), weights

    @torch.no_grad()
    def pseudo_labels(self, means: Tensor, projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels from the gated predictions, without gradient: mask (B, H, W), sdf (B, 1, H, W), boundary (B, H, W)."""
        with record_function("gates"):
            return F.label_projections(projections, self.gate_weights(means), [head.bias for head in self.heads])

    def gate_weights(self, means: Tensor) -> Tensor:
        """(B, E, channels) -> (B, T, E), softmax over the experts, in the parameters' dtype even under autocast."""

        def linear(name: str, x: Tensor) -> Tensor:
            """The layer `name` of all gates: (T, B, I) -> (T, B, O)."""
            layers = [getattr(gate, name) for gate in self.gates]
            weights, biases = (torch.stack([getattr(layer, part) for layer in layers]) for part in ("weight", "bias"))
            return torch.baddbmm(biases[:, None], x, weights.mT)

        with torch.autocast(means.device.type, enabled=False):
            inputs = means.flatten(1).to(self.heads[0].weight.dtype)
            hidden = linear("linear1", inputs.expand(len(self.gates), -1, -1)).relu()
            attended = hidden * linear("attention", hidden).softmax(2)
            return linear("linear2", self.dropout(attended)).softmax(2).transpose(0, 1)


class SemiMoE(nn.Module):
    """Experts and gating together: images (B, in_channels, H, W) -> Output, for any H and W.

    num_classes: K, at least 2, including the background. expert_tasks: the task of each expert, "mask", "sdf" or
    "boundary"; several experts may share a task. There is one gated prediction per distinct task, in the order of the
    first expert with the task. Raises ValueError for fewer classes and for unknown tasks.
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
        *gated, gate_weights = self.gating(Projected(means, projections))
        predictions = dict(zip(self.tasks, gated, strict=True))
        return Output(predictions.get("mask"), predictions.get("sdf"), predictions.get("boundary"), own, gate_weights)

    def run_experts(self, images: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Run the experts. Returns means, projections and own predictions as `MultiGating.projections` does.

        In training each of `groups` equal runs of consecutive images has batch statistics of its own.

        One pass over the features computes all of them. Only if an expert or its head has hooks, the experts run as
        modules, so that the hooks fire; their heads then read the features a second time. Register hooks before
        torch.compile; a replayed CUDA graph runs none (--no-cuda-graph).
        """
        if self.training:
            self._count_batches(groups)
        if any(_has_hooks(module) for expert in self.experts for module in (expert, expert.head)):
            features, own = zip(*(expert(images, groups) for expert in self.experts), strict=True)
            means, projections, _ = self.gating.projections(features)
            return means, projections, own
        kernels = upsampling_kernels(self.experts, images)
        features = [expert.features(images, groups, own) for expert, own in zip(self.experts, kernels, strict=True)]
        return self.gating.projections(features, [expert.head for expert in self.experts])

    def _count_batches(self, groups: int) -> None:
        """Count the batches that BN has seen, in one operation for all layers."""
        norms = [layer for layer in self.experts.modules() if isinstance(layer, BatchNormReLU) and layer.training]
        if norms:  # none if all are frozen, or if each counts for itself (nn.SyncBatchNorm)
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], groups)


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs forward or backward hooks."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or nn.modules.module._has_any_global_hook()
    )


class AdaptiveMultiObjectiveLoss(nn.Module):
    """Sum over j of c_j exp(-s_j) L_j + regularizer exp(s_j), with one learned s_j (`log_vars`) per term.

    terms L: (T,) -> scalar. coefficients c: T numbers.
    """

    def __init__(
        self, coefficients: Sequence[float] = (1.0, 0.5, 1.0), regularizer: float = 0.4, initial: float = 1.0
    ) -> None:
        super().__init__()
        self.coefficients, self.regularizer = tuple(coefficients), regularizer
        self.log_vars = nn.Parameter(torch.full((len(self.coefficients),), float(initial)))

    def forward(self, terms: Tensor) -> Tensor:
        return F.adaptive_loss(terms, self.log_vars, self.coefficients, self.regularizer)


def pad_to_stride(images: Tensor) -> Tensor:
    """Images (B, C, H, W) whose lower and right borders are repeated until both sides are multiples of 16."""
    bottom, right = (-images.shape[-2] % STRIDE, -images.shape[-1] % STRIDE)
    return nn.functional.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def initialize(module: nn.Module) -> None:
    """Draw weights: Kaiming-normal (fan-in) in convolutions and linear layers, N(1, 0.02) in BN; all biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


def _up(in_channels: int, out_channels: int) -> UpsamplingBlock:
    """Nearest x2 upsampling, 3x3 convolution, BN, ReLU. In the published code, key 0 is the upsampling layer."""
    convolution = UpsamplingConv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return UpsamplingBlock(OrderedDict({"1": convolution, "2": BatchNormReLU(out_channels)}))


def _double_conv(in_channels: int, out_channels: int) -> ConvBlock:
    """Twice 3x3 convolution, BN, ReLU. In the published code, keys 2 and 5 are the ReLUs.

    The convolutions have no bias, because BN would subtract it.
    """
    return ConvBlock(
        OrderedDict(
            {
                "0": nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                "1": BatchNormReLU(out_channels),
                "3": nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                "4": BatchNormReLU(out_channels),
            }
        )
    )
