"""Operations under torch.func and in forward mode, under other defaults of PyTorch, and with mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from semimoe_fast import backend, ops
from semimoe_fast import functional as F

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) for rows in (2, 1, 2)]
MASKS = (X[:, 0] > 0).to(torch.uint8)
SDF = X[:, 1].tanh()
ONE, ZERO = torch.ones(4), torch.zeros(4)

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm_relu": lambda x: F.batch_norm_relu(x, ONE, ZERO, None, None) * X,
    "batch_norm_relu of evaluation": lambda x: F.batch_norm_relu(x, ONE, ZERO, ZERO, ONE, training=False) * X,
    "project_experts": lambda x: F.project_experts([x, 2 * x], WEIGHTS)[1],
    "fold_upsampling": lambda x: F.fold_upsampling([x[..., :3, :3]])[0].square(),
    "objective_terms": lambda x: F.objective_terms(x[:, :2], x[:, 2:3], x[:, :2], MASKS, SDF, MASKS),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_transforms_see_the_derivative(operation: Callable[[Tensor], Tensor]) -> None:
    """torch.func.grad and forward mode agree with backward."""
    x, direction = X.clone().requires_grad_(), X.roll(1, 0)
    (gradient,) = torch.autograd.grad(operation(x).sum(), x)
    expected = (gradient * direction).sum()
    assert expected.abs() > 1e-3
    close = {"rtol": 1e-3, "atol": 1e-4}  # float32 sums in other orders
    torch.testing.assert_close(torch.func.grad(lambda x: operation(x).sum())(X), gradient, **close)
    torch.testing.assert_close(torch.func.jvp(lambda x: operation(x).sum(), (X,), (direction,))[1], expected, **close)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(operation(dual).sum()).tangent
    torch.testing.assert_close(tangent, expected, **close)


def test_sums_over_float16_do_not_overflow() -> None:
    """A transform takes the reference, which sums 65,536 pixels in float32 as the other backends do."""
    x = torch.randn(1, 5, 256, 256, generator=torch.Generator().manual_seed(1)).half()
    masks, sdf = (x[:, 0] > 0).to(torch.uint8), x[:, 1].float().tanh()

    def terms(x: Tensor) -> Tensor:
        return F.objective_terms(x[:, :2], x[:, 2:3], x[:, 3:], masks, sdf, masks)

    expected = terms(x)
    with torch.autograd.forward_ad.dual_level():
        found = terms(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_another_default_device() -> None:
    """CPU tensors stay on the CPU."""

    def results() -> list[Tensor]:
        terms = F.objective_terms(X[:, :2], X[:, 2:3], X[:, :2], MASKS, SDF, MASKS)
        return [F.batch_norm_relu(X, ONE, ZERO, None, None), terms]

    expected = results()
    with torch.device("meta"):
        found = results()
    assert all(map(torch.equal, found, expected))


def test_another_default_dtype() -> None:
    """Triton kernels accumulate in float32."""
    if reason := ops.why_not_fused("project_experts", "cpu"):
        pytest.skip(reason)
    terms = torch.ones(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with backend("fused"):
            means, *_ = F.project_experts([X, 2 * X], WEIGHTS)
            total = F.adaptive_loss(terms, 0 * terms)
    finally:
        torch.set_default_dtype(torch.float32)
    assert means.dtype == total.dtype == torch.float32
    torch.testing.assert_close(means[:, 0], X.mean((2, 3)))


def test_the_portable_distances_of_wide_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes the pixels of a row in parts, so that its memory does not grow with the square of the width."""
    labels = (X > 1).reshape(2, 16, 16)
    with backend("reference"):
        expected = F.squared_distance(labels)
    monkeypatch.setattr("semimoe_fast.ops.portable.ROW_CHUNK", 48)  # 3 of 16 pixels
    with backend("portable"):
        assert torch.equal(F.squared_distance(labels), expected)


@pytest.mark.parametrize("name", ["reference", "portable"])
def test_gates_in_the_dtype_of_the_features(name: str) -> None:
    """Whatever the dtype of the weights."""
    gates, biases = torch.rand(2, 3, 2), [torch.randn(len(weight)) for weight in WEIGHTS]
    with backend(name):
        outputs = F.multi_gate([X.bfloat16(), X.bfloat16()], gates, WEIGHTS, biases)
    assert {output.dtype for output in outputs} == {torch.bfloat16}


def test_targets_within_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets have no derivative, so the backend that serves otherwise computes them, not the slow reference."""
    monkeypatch.setattr(ops.reference, "distance_targets", lambda *_: pytest.fail("the reference computes targets"))

    def loss(x: Tensor) -> Tensor:
        return F.tanh_mse_loss(x, F.distance_targets(MASKS)[0])

    raw = X[:, :1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(raw), raw)
    torch.testing.assert_close(torch.func.grad(loss)(X[:, :1]), expected)
