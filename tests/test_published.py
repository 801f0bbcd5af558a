"""The full-width network and one whole training step compared with the published implementation.

The comparison is in float64, where the order of summation does not matter. In float32, single gradients of the
full-width network agree to three digits at most between processors, so float32 is compared with our own float64.
"""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import model as model_module
from semimoe_fast.checkpoint import export_published, import_published
from semimoe_fast.data import glands
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, BatchNormReLU, MultiGating, SemiMoE, UpsamplingConv2d
from semimoe_fast.objective import StepLosses, objective
from semimoe_fast.published import EXPERT_PARTS, published_expert_key, rename_gating

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 against float64

GOLDEN = Path(__file__).parent / "golden"
Parts = dict[str, dict[str, Tensor]]


def seeded_tensor(part: str, key: str, shape: list[int]) -> Tensor:
    """The weights of the golden run as float64. The seed of each tensor is computed from its name."""
    rng = np.random.default_rng(zlib.crc32(f"20261123:{part}.{key}".encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1 and key.endswith("weight"):
        values = rng.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        values = rng.uniform(-0.1, 0.1, shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32).astype(np.float64))


@pytest.fixture(scope="module")
def published() -> Parts:
    keys = json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())
    return {part: {key: seeded_tensor(part, key, shape) for key, shape in keys[part].items()} for part in keys}


@pytest.mark.slow
def test_golden_eval_forward(published: Parts, golden) -> None:
    expected = golden("network64")
    model = import_published(published)
    with torch.no_grad():
        images = torch.from_numpy(expected["image_labelled"]).double()
        means, *_ = model.run_experts(images)
        output = model(images)
    for e, part in enumerate(EXPERT_PARTS):
        np.testing.assert_allclose(output.own[e], expected[f"eval/{part}/logits"], **EXACT)
        np.testing.assert_allclose(means[:, e].mean(0), expected[f"eval/{part}/feature_mean_per_channel"], **EXACT)
    for task in ("mask", "sdf", "boundary"):
        np.testing.assert_allclose(getattr(output, task), expected[f"eval/gated_{task}"], **EXACT)


def test_golden_training_step(published: Parts, golden) -> None:
    expected = golden("network64")
    model = import_published(published).train()
    adaptive = AdaptiveMultiObjectiveLoss().double()
    losses = golden_step(model, adaptive, expected)

    check_golden_losses(losses, adaptive.log_vars.grad, expected)
    for part, expert in zip(EXPERT_PARTS, model.experts, strict=True):
        for key, parameter in expert.named_parameters():
            check_golden_gradient(parameter, f"{part}/{published_expert_key(key)}", expected)
    gating_parameters = dict(model.gating.named_parameters())
    for key in json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())["gating_model"]:
        check_golden_gradient(gating_parameters[rename_gating(key)], f"gating_model/{key}", expected)


def check_golden_losses(losses: NamedTuple, log_vars_grad: Tensor, expected: dict[str, np.ndarray]) -> None:
    for ours, theirs in (("unsupervised", "unsup"), ("supervised", "sup")):
        for value in ("terms", "total"):
            np.testing.assert_allclose(getattr(losses, f"{ours}_{value}"), expected[f"step/{theirs}_{value}"], **EXACT)
    np.testing.assert_allclose(log_vars_grad, expected["step/log_vars_grad"], **EXACT)


def check_golden_gradient(parameter: Tensor, key: str, expected: dict[str, np.ndarray]) -> None:
    """The gradient of a bias before BN is zero up to rounding errors of about 1e-16."""
    norm = expected[f"step/grad_norm/{key}"]
    np.testing.assert_allclose(parameter.grad.norm(), norm, rtol=1e-7, atol=1e-12, err_msg=key)


@pytest.mark.slow
def test_pseudo_labels_of_the_golden_step(published: Parts, golden) -> None:
    expected = golden("network64")
    model = import_published(published).train()
    model.gating.dropout.p = 0.0
    with torch.no_grad():
        means, projections, _ = model.run_experts(torch.from_numpy(expected["image_unlabelled"]).double())
    mask, sdf, boundary = model.gating.pseudo_labels(means, projections)
    np.testing.assert_array_equal(mask, expected["step/pseudo_mask"])
    np.testing.assert_array_equal(boundary, expected["step/pseudo_boundary"])
    np.testing.assert_allclose(sdf, expected["step/pseudo_sdf"], **EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_step_equals_the_float64_step_up_to_rounding(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound comes from float64 steps with random noise in every layer, as large as float32 rounding.

    A float32 sum of n products has an error of about sqrt(n) roundings of 2^-24, whatever the order of summation. The
    bound is 4 times the largest deviation of three steps with such noise, and at least that error of a sum over all
    pixels, because means and gradients of parameters get no noise. Smooth layers replace ReLU and max pooling, and the
    pseudo-labels are those of float64: one value on the other side of a kink changes a gradient more than all rounding.
    """
    original = make_smooth(SemiMoE(width=8), monkeypatch)
    mask = glands.glands(2, 64, seed=1)[1]
    inputs = {
        "image_labelled": torch.randn(2, 3, 64, 64).numpy(),
        "image_unlabelled": torch.randn(2, 3, 64, 64).numpy(),
        "mask": mask.numpy(),
        "sdf": F.distance_targets(mask)[0][:, None].numpy(),
        "boundary": F.distance_targets(mask)[1].numpy(),
        "step/unsup_weight": np.array(0.3),
    }
    with torch.no_grad():
        exact_model = copy.deepcopy(original).double()
        unlabeled = torch.from_numpy(inputs["image_unlabelled"]).double()
        means, projections, _ = exact_model.run_experts(unlabeled)
        labels = exact_model.gating.pseudo_labels(means, projections)

    def labels_of_float64(gating: MultiGating, means: Tensor, projections: Tensor) -> list[Tensor]:
        return [x.to(means.dtype) if x.is_floating_point() else x for x in labels]

    monkeypatch.setattr(MultiGating, "pseudo_labels", labels_of_float64)

    def step(dtype: torch.dtype, noise_seed: int | None = None) -> dict[str, Tensor]:
        """Loss terms, and the gradient of each expert and of the gating as one vector."""
        model = copy.deepcopy(original).to(dtype, memory_format=layout).train()
        if noise_seed is not None:
            add_rounding_noise(model, noise_seed)
        losses = golden_step(model, AdaptiveMultiObjectiveLoss().to(dtype), inputs)
        parts = {f"expert {e}": expert for e, expert in enumerate(model.experts)} | {"gating": model.gating}
        gradients = {k: torch.cat([p.grad.flatten() for p in part.parameters()]) for k, part in parts.items()}
        terms = torch.cat([losses.supervised_terms, losses.unsupervised_terms])
        return {name: value.detach().double() for name, value in (gradients | {"terms": terms}).items()}

    exact = step(torch.float64)

    def deviations(other: dict[str, Tensor]) -> dict[str, float]:
        return {name: ((other[name] - value).norm() / value.norm()).item() for name, value in exact.items()}

    with_noise = [deviations(step(torch.float64, seed)) for seed in range(3)]
    for name, deviation in deviations(step(torch.float32)).items():
        bound = max(2**-24 * mask.numel() ** 0.5, 4 * max(noisy[name] for noisy in with_noise))
        assert deviation <= bound < 1e-4, name


def make_smooth(model: SemiMoE, monkeypatch: pytest.MonkeyPatch) -> SemiMoE:
    """Replace ReLU and max pooling by smooth functions."""

    def forward(layer: BatchNormReLU, x: Tensor, groups: int = 1, skip: Tensor | None = None) -> Tensor:
        parts = [torch.nn.BatchNorm2d.forward(layer, part) for part in x.chunk(groups)]
        y = torch.nn.functional.softplus(torch.cat(parts))
        return y if skip is None else torch.cat([skip, y], 1)

    monkeypatch.setattr(BatchNormReLU, "forward", forward)
    monkeypatch.setattr(model_module, "pool_and_skip", lambda x: (torch.nn.functional.avg_pool2d(x, 2), x))
    return model


def add_rounding_noise(model: SemiMoE, seed: int) -> None:
    """Multiply the output of every convolution and linear layer by noise as large as float32 rounding errors."""
    random = torch.Generator().manual_seed(seed)

    def hook(layer: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        size = 2**-24 * layer.weight[0].numel() ** 0.5
        return output * (1 + size * torch.randn(output.shape, generator=random, dtype=output.dtype))

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(hook)


def test_step_equals_the_published_step_in_exact_arithmetic() -> None:
    """Biases before BN change nothing, and upsampling can be part of the next convolution. Shown in float64."""
    torch.manual_seed(0)
    biased = export_published(SemiMoE(width=4))
    for part in EXPERT_PARTS:
        for key, value in biased[part].items():
            if key.endswith(".bias"):
                value.uniform_(-0.5, 0.5)
    inputs = {
        "image_labelled": torch.randn(2, 3, 32, 32).numpy(),
        "image_unlabelled": torch.randn(2, 3, 32, 32).numpy(),
        "mask": torch.randint(0, 2, (2, 32, 32), dtype=torch.uint8).numpy(),
        "sdf": torch.rand(2, 1, 32, 32).numpy(),
        "boundary": torch.randint(0, 2, (2, 32, 32), dtype=torch.uint8).numpy(),
        "step/unsup_weight": np.array(0.5),
    }
    biased = {
        part: {key: v.double() if v.is_floating_point() else v for key, v in biased[part].items()} for part in biased
    }
    runs = []
    for model in (import_published(biased), as_published(import_published(biased), biased)):
        model.train()
        losses = golden_step(model, AdaptiveMultiObjectiveLoss().double(), inputs)
        runs.append((losses, dict(model.named_parameters())))
    (folded, ours), (original, theirs) = runs
    for result, reference in zip(folded, original, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-12)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-10)


class UpsampledConv2d(torch.nn.Conv2d):
    """Nearest x2 upsampling, then the convolution with its own weights."""

    def forward(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.interpolate(x, scale_factor=2))


def as_published(model: SemiMoE, parts: Parts) -> SemiMoE:
    """The published form of the model: biases before BN, and upsampling as a separate operation."""
    for part, expert in zip(EXPERT_PARTS, model.experts, strict=True):
        names = {module: name for name, module in expert.named_modules()}
        for convolution in [m for m in names if isinstance(m, torch.nn.Conv2d) and m.bias is None]:
            key = published_expert_key(f"{names[convolution]}.bias")
            convolution.bias = torch.nn.Parameter(parts[part][key].clone())
            if isinstance(convolution, UpsamplingConv2d):
                convolution.__class__ = UpsampledConv2d  # same parameters, other forward
    return model


def golden_step(model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss, inputs: dict[str, np.ndarray]) -> StepLosses:
    model.gating.dropout.p = 0.0  # the golden run has dropout off
    dtype = adaptive.log_vars.dtype
    labeled, unlabeled, sdf = (
        torch.from_numpy(inputs[k]).to(dtype) for k in ("image_labelled", "image_unlabelled", "sdf")
    )
    targets = (torch.from_numpy(inputs["mask"]), sdf, torch.from_numpy(inputs["boundary"]))
    losses = objective(model, adaptive, labeled, targets, unlabeled, float(inputs["step/unsup_weight"]))
    losses.total.backward()
    return losses
