"""The full-width network and one whole training step against the published implementation."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from semimoe_fast.checkpoint import export_published, import_published
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE, UpsamplingConv2d
from semimoe_fast.objective import StepLosses, objective
from semimoe_fast.published import EXPERT_PARTS, published_expert_key, rename_gating

pytestmark = pytest.mark.slow  # the network at its published width

GOLDEN = Path(__file__).parent / "golden"
Parts = dict[str, dict[str, Tensor]]


def seeded_tensor(part: str, key: str, shape: list[int]) -> Tensor:
    """The recipe by which the golden run drew its weights: each tensor from a seed made of its name."""
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
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def published() -> Parts:
    keys = json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())
    return {part: {key: seeded_tensor(part, key, shape) for key, shape in keys[part].items()} for part in keys}


def test_eval_forward(published: Parts, golden) -> None:
    expected = golden("network")
    model = import_published(published)
    with torch.no_grad():
        images = torch.from_numpy(expected["image_labelled"])
        means, *_ = model.run_experts(images)
        output = model(images)
    # float32 through 23 convolutions of up to 9,216 terms, summed in another order
    close = {"rtol": 1e-3, "atol": 1e-3}
    for e, part in enumerate(("segment_model", "sdf_model", "boundary_model")):
        np.testing.assert_allclose(output.own[e], expected[f"eval/{part}/logits"], **close)
        np.testing.assert_allclose(means[:, e].mean(0), expected[f"eval/{part}/feature_mean_per_channel"], **close)
    for task in ("mask", "sdf", "boundary"):
        np.testing.assert_allclose(getattr(output, task), expected[f"eval/gated_{task}"], **close)


@pytest.mark.parametrize(("form", "tolerance"), [("as published", 1e-3), ("ours", 3e-3)])
def test_training_step(published: Parts, golden, form: str, tolerance: float) -> None:
    """Norms of gradients as the published code's; in ours, whose sums have another order, up to its effect on them."""
    expected = golden("network")
    model = import_published(published).train()
    if form == "as published":
        model = as_published(model, published)
    adaptive = AdaptiveMultiObjectiveLoss()
    losses = golden_step(model, adaptive, expected)

    np.testing.assert_allclose(losses.unsupervised_terms, expected["step/unsup_terms"], rtol=1e-4)
    np.testing.assert_allclose(losses.supervised_terms, expected["step/sup_terms"], rtol=1e-4)
    np.testing.assert_allclose(losses.unsupervised_total, expected["step/unsup_total"], rtol=1e-4)
    np.testing.assert_allclose(losses.supervised_total, expected["step/sup_total"], rtol=1e-4)
    np.testing.assert_allclose(adaptive.log_vars.grad, expected["step/log_vars_grad"], rtol=1e-3)

    for part, expert in zip(EXPERT_PARTS, model.experts, strict=True):
        for key, parameter in expert.named_parameters():
            norm = expected[f"step/grad_norm/{part}/{published_expert_key(key)}"]
            # a bias ahead of BN has no gradient but rounding errors, of about 1e-8
            np.testing.assert_allclose(parameter.grad.norm(), norm, rtol=tolerance, atol=1e-6, err_msg=f"{part} {key}")

    # The golden gating norms are of gradients accumulated onto those of case b of the gating archive, as its three head
    # biases show: |b| alone explains them but for a remainder that is the norm of this step's own gradient.
    earlier = golden("gating")
    gating_parameters = dict(model.gating.named_parameters())
    for key in json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())["gating_model"]:
        accumulated = gating_parameters[rename_gating(key)].grad + torch.from_numpy(earlier[f"b/grad_param/{key}"])
        np.testing.assert_allclose(
            accumulated.norm(), expected[f"step/grad_norm/gating_model/{key}"], rtol=tolerance, err_msg=key
        )


def test_step_is_the_published_one_in_exact_arithmetic() -> None:
    """A convolution's bias ahead of BN changes nothing, and upsampling may be part of the convolution after it: here in
    float64, where rounding is small.

    In float32 either change moves single gradient norms of the full-width network by up to 3e-3, as does any other
    order of summation (channels-last, say).
    """
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
    runs = []
    for model in (import_published(biased), as_published(import_published(biased), biased)):
        model = model.double().train()
        losses = golden_step(model, AdaptiveMultiObjectiveLoss().double(), inputs)
        runs.append((losses, dict(model.named_parameters())))
    (folded, ours), (original, theirs) = runs
    for mine, its in zip(folded, original, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-10)


class UpsampledConv2d(torch.nn.Conv2d):
    """Nearest x2 upsampling, then the convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.interpolate(x, scale_factor=2))


def as_published(model: SemiMoE, parts: Parts) -> SemiMoE:
    """The biases that import folds into BN's running means are put back, and images upsampled before a convolution."""
    for part, expert in zip(EXPERT_PARTS, model.experts, strict=True):
        names = {module: name for name, module in expert.named_modules()}
        for convolution in [m for m in names if isinstance(m, torch.nn.Conv2d) and m.bias is None]:
            key = published_expert_key(f"{names[convolution]}.bias")
            convolution.bias = torch.nn.Parameter(parts[part][key].clone())
            if isinstance(convolution, UpsamplingConv2d):
                convolution.__class__ = UpsampledConv2d  # the same layer with another forward
    return model


def golden_step(model: SemiMoE, adaptive: AdaptiveMultiObjectiveLoss, inputs: dict[str, np.ndarray]) -> StepLosses:
    for gate in model.gating.gates:
        gate.dropout.p = 0.0  # the golden run has dropout off
    dtype = adaptive.log_vars.dtype
    labelled, unlabelled, sdf = (
        torch.from_numpy(inputs[k]).to(dtype) for k in ("image_labelled", "image_unlabelled", "sdf")
    )
    targets = (torch.from_numpy(inputs["mask"]), sdf, torch.from_numpy(inputs["boundary"]))
    losses = objective(model, adaptive, labelled, targets, unlabelled, float(inputs["step/unsup_weight"]))
    losses.total.backward()
    return losses


def test_pseudo_labels_of_the_golden_step(published: Parts, golden) -> None:
    expected = golden("network")
    model = import_published(published).train()
    for gate in model.gating.gates:
        gate.dropout.p = 0.0
    with torch.no_grad():
        means, products, _ = model.run_experts(torch.from_numpy(expected["image_unlabelled"]))
    mask, sdf, boundary = model.gating.pseudo_labels(means, products)
    # an argmax may flip where two logits agree to rounding error
    assert (mask.numpy() != expected["step/pseudo_mask"]).mean() < 1e-3
    assert (boundary.numpy() != expected["step/pseudo_boundary"]).mean() < 1e-3
    np.testing.assert_allclose(sdf, expected["step/pseudo_sdf"], atol=1e-3)
