"""The fused adaptive loss against the float64 reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(ops.why_not_fused("adaptive_loss", DEVICE)), reason=str(ops.why_not_fused("adaptive_loss", DEVICE))
)
COEFFICIENTS = (1.0, 0.5, 1.0, 2.0, 0.25)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIMOE_BACKEND", "fused")


def draw(terms: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(terms)
    values = torch.rand(terms, generator=random), torch.randn(terms, generator=random)
    return tuple(value.to(DEVICE, dtype).requires_grad_() for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("terms", [1, 3, 5])
def test_equals_reference(terms: int, dtype: torch.dtype) -> None:
    arguments = draw(terms, dtype)
    exact = [value.detach().cpu().double().requires_grad_() for value in arguments]
    settings = COEFFICIENTS[:terms], 0.3
    total, expected = F.adaptive_loss(*arguments, *settings), reference.adaptive_loss(*exact, *settings)
    (3 * total).backward()
    (3 * expected).backward()
    # rounding errors of up to five float32 terms; gradients have 8 bits in bfloat16, which the interpreter truncates
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(total.cpu().double(), expected, rtol=tolerance, atol=0)
    for value, oracle in zip(arguments, exact, strict=True):
        assert value.grad.dtype == dtype
        torch.testing.assert_close(value.grad.cpu().double(), oracle.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_total(value: float) -> None:
    terms, log_vars = (tensor.detach() for tensor in draw(3))
    terms[1] = value
    expected = reference.adaptive_loss(terms, log_vars)
    torch.testing.assert_close(F.adaptive_loss(terms, log_vars), expected, equal_nan=True)


def test_custom_op_passes_opcheck_and_compiles() -> None:
    terms, log_vars = draw(3)
    torch.library.opcheck(torch.ops.semimoe_fast.adaptive_loss.default, (terms, log_vars, [1.0, 0.5, 1.0], 0.4))
    compiled = torch.compile(F.adaptive_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(terms, log_vars), F.adaptive_loss(terms, log_vars))


def test_second_derivatives_are_refused() -> None:
    terms, log_vars = draw(3)
    (first,) = torch.autograd.grad(F.adaptive_loss(terms, log_vars), [log_vars], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def test_strided_terms():
    terms, log_vars = torch.randn(6)[::2], torch.randn(6)[::2]
    with ops.backend("reference"):
        expected = F.adaptive_loss(terms, log_vars)
    with ops.backend("fused"):
        torch.testing.assert_close(F.adaptive_loss(terms, log_vars), expected)
