"""The objective of the compiled module: accuracy, threads, limits and refused arguments.

test_objective_triton.py has the tests that it shares with the Triton kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.errors import UserError
from semimoe_fast.ops import _native, _native_objective, portable, reference

ULP = 2.0**-23
LEAST = 2.0**-126  # exp gives 0 below it
ONES = torch.ones(3)


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMIMOE_BACKEND", raising=False)


def draw(classes: int, *size: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """One set of random predictions, and targets, as (B, channels, H, W)."""
    random = torch.Generator().manual_seed(classes)
    batch, height, width = size
    logits = [torch.randn(batch, channels, height, width, generator=random) for channels in (classes, 1, 2)]
    mask = torch.randint(0, classes, (batch, 1, height, width), generator=random)
    sdf = 2 * torch.rand(batch, 1, height, width, generator=random) - 1
    return logits, (mask.to(torch.uint8), sdf, (mask == 1).to(torch.uint8))


def gradients_of(x: Tensor, classes: int = 2, sdf: float = 0.0) -> list[Tensor]:
    """Gradients by the native module of inputs for which they are simple functions of x.

    Mask logits 0, -x, -inf, ..., target class 0, alpha = 1 for class 0 and else 0, beta = 0: the gradient of the second
    logit is -P_0 P_1. Raw sdf x: the gradient is (tanh(x) - sdf) (1 - tanh(x)^2).
    """
    x = x.view(1, 1, 1, -1)
    mask_logits = torch.cat([torch.zeros_like(x), -x, *[torch.full_like(x, -torch.inf)] * (classes - 2)], 1)
    zero = torch.zeros_like(x, dtype=torch.uint8)
    alpha = torch.eye(classes + 1)[:1].contiguous()
    prediction, targets = (mask_logits, x, x.clone()), (zero, torch.full_like(x, sdf), zero)
    grad_output = torch.tensor([1.0, x.numel() / 2, 1.0])
    (gradients,) = _native_objective.backward(grad_output, [prediction], targets, alpha, torch.zeros_like(alpha))
    return [gradient.double() for gradient in gradients]


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected) / expected).abs().max().item()


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_over_the_whole_range(classes: int, instruction_set: str) -> None:
    """P_0 P_1 = e / (1 + e)^2, e = exp(-x). Errors: exp 0.7 ulp; the reciprocal, which counts twice, and four other
    operations 0.5 ulp each."""
    x = torch.linspace(0, 87.33, 1_000_003)
    e = (-x.double()).exp()
    assert relative_error(gradients_of(x, classes)[0][0, 1, 0], -e / (1 + e).square()) < 4 * ULP


@pytest.mark.parametrize("classes", [2, 3])
def test_exp_below_the_normal_numbers(classes: int, instruction_set: str) -> None:
    x = torch.cat([torch.linspace(87.3, 105, 10_007), torch.tensor([1e3, 1e9, 3e38, torch.inf])])
    result = gradients_of(x, classes)[0][0, 1, 0]
    assert ((result + (-x.double()).exp()).abs() < LEAST).all()


def test_slope_of_tanh_over_the_whole_range(instruction_set: str) -> None:
    """(tanh - 2) (1 - tanh^2), with e = exp(-2 |x|). Errors as for the softmax, and 1 ulp for tanh - 2."""
    x = torch.linspace(-43.6, 43.6, 1_000_003)
    tanh, e = x.double().tanh(), (-2 * x.double().abs()).exp()
    assert relative_error(gradients_of(x, sdf=2)[1][0, 0, 0], (tanh - 2) * 4 * e / (1 + e).square()) < 5 * ULP
    beyond = torch.tensor([50.0, -50.0, 1e9, -3e38, torch.inf, -torch.inf])
    assert (gradients_of(beyond, sdf=2)[1].abs() < 4 * LEAST).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_threads_do_not_change_the_result(classes: int, instruction_set: str) -> None:
    logits, targets = draw(classes, 2, 199, 301)  # enough pixels for 7 threads; the last block is partial
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        terms, alpha, beta = _native_objective.forward([logits], targets, torch.float32)
        (gradients,) = _native_objective.backward(ONES, [logits], targets, alpha, beta)
        results.append([terms, alpha, beta, *gradients])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_sums_of_many_pixels_are_accurate(instruction_set: str) -> None:
    """Sums of blocks are double. A float32 sum of four million terms would have a much larger error."""
    logits, targets = draw(2, 1, 2048, 2048)
    terms, _, _ = _native_objective.forward([logits], targets, torch.float32)
    mask, sdf, boundary = targets
    expected = reference.objective_terms(*(x.double() for x in logits), mask[:, 0], sdf.double(), boundary[:, 0])
    torch.testing.assert_close(terms.double(), expected, rtol=2 * ULP, atol=0)  # the final rounding, and a margin


@pytest.mark.parametrize("classes", [254, 255, 256, 300])
def test_more_classes_than_a_byte_can_hold(classes: int) -> None:
    """From 256 classes on, the portable backend computes."""
    (mask_logits, raw, boundary_logits), (_, sdf, boundary) = draw(classes, 1, 5, 7)
    mask = torch.arange(classes - 20, classes + 15).view(1, 5, 7)
    mask_logits.requires_grad_()
    arguments = (raw, boundary_logits, mask, sdf, boundary[:, 0])
    terms = F.objective_terms(mask_logits, *arguments)
    (gradient,) = torch.autograd.grad(terms.sum(), mask_logits)
    exact = mask_logits.detach().double().requires_grad_()
    expected = reference.objective_terms(exact, raw.double(), boundary_logits.double(), *arguments[2:])
    (oracle,) = torch.autograd.grad(expected.sum(), exact)
    # float32 probabilities and sums of 35 of them; gradients relative to the largest
    torch.testing.assert_close(terms.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), oracle, rtol=0, atol=5e-6 * oracle.abs().max().item())


def test_default_backend_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled module: fused, even if Triton's interpreter is enabled. Without it: portable."""
    for operation in ("objective_terms", "joint_objective_terms"):
        assert ops.choose(operation, "cpu")[0] == "fused"
    monkeypatch.setattr(_native, "why_unavailable", lambda device_type: "it is missing")
    assert ops.choose("objective_terms", "cpu") == ("portable", "it is missing")


def test_float64_uses_the_portable_backend() -> None:
    logits, (mask, sdf, boundary) = draw(2, 2, 9, 11)
    targets = (mask[:, 0], sdf.double(), boundary[:, 0])
    exact = [x.double() for x in logits]
    assert torch.equal(F.objective_terms(*exact, *targets), portable.objective_terms(*exact, *targets))


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIMOE_SIMD", "mmx")
    logits, (mask, sdf, boundary) = draw(2, 1, 4, 4)
    with pytest.raises(UserError, match="SEMIMOE_SIMD='mmx'"):
        F.objective_terms(*logits, mask[:, 0], sdf, boundary[:, 0])


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (0, lambda x: x.double(), "expected torch.float32"),
        (0, lambda x: x.to("meta"), "on the CPU"),
        (0, lambda x: x.mT.contiguous().mT, "one stride from pixel to pixel"),
        (0, lambda x: x[:, :0], "1 to 255 classes"),
        (0, lambda x: x.expand(1, 2, 4, 6).repeat(1, 128, 1, 1), "1 to 255 classes"),
        (1, lambda x: x.repeat(1, 2, 1, 1), "one sdf"),
        (1, lambda x: x[:, :, :3], "expected torch.float32"),
        (2, lambda x: x.half(), "expected torch.float32"),
        (3, lambda x: x.long(), "expected torch.uint8 or torch.bool"),
        (3, lambda x: x[:, 0], "expected torch.uint8 or torch.bool"),
        (4, lambda x: x.half(), "expected torch.float32"),
        (5, lambda x: x.mT.contiguous().mT, "one stride from pixel to pixel"),
        (6, lambda x: x[:2], r"expected torch.float32 \(3,\)"),
        (7, lambda x: x.repeat(1, 2)[:, ::2], "contiguous"),
        (8, lambda x: x.double(), "expected torch.float32"),
    ],
)
def test_unsupported_tensors_are_refused(tensor: int, change, message: str) -> None:
    logits, targets = draw(2, 1, 4, 6)
    tensors = [*logits, *targets, ONES, torch.zeros(1, 4), torch.zeros(1, 4)]
    tensors[tensor] = change(tensors[tensor])
    with pytest.raises(ValueError, match=message) as caught:
        _native_objective.backward(tensors[6], [tensors[:3]], tensors[3:6], *tensors[7:])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_terms_are_differentiated_by_the_true_field_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels differentiate by the predictions alone, so the portable functions take over."""
    monkeypatch.setenv("SEMIMOE_BACKEND", backend)
    logits, (mask, sdf, boundary) = draw(2, 2, 8, 8)
    sdf = sdf[:, 0].requires_grad_()
    (gradient,) = torch.autograd.grad(F.objective_terms(*logits, mask[:, 0], sdf.tanh(), boundary[:, 0])[1], sdf)
    (expected,) = torch.autograd.grad(reference.tanh_mse_loss(logits[1], sdf.tanh()[:, None]), sdf)
    torch.testing.assert_close(gradient, expected)
    assert expected.any()
