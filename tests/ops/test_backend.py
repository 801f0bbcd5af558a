"""Choice of the backend: SEMIMOE_BACKEND, the context manager and the reasons given."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import semimoe_fast
from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import _triton, portable, reference

ONE_HEAD = ([torch.zeros(1, 2, 4, 4)], torch.zeros(1, 1, 1), [torch.zeros(2, 2)], [torch.zeros(2)])


def test_every_operation_names_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in ops.OPERATIONS:
        backend, reason = ops.choose(operation, "cpu")
        assert backend in ops.BACKENDS
        assert reason
        assert hasattr(F, operation)
        assert hasattr(reference, operation)
        assert hasattr(portable, operation)
    monkeypatch.setenv("SEMIMOE_BACKEND", "fused")
    with pytest.raises(ops.BackendError, match="fused backend cannot serve soft_dice_loss on cpu: it has no fused"):
        F.soft_dice_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
    monkeypatch.setenv("SEMIMOE_BACKEND", "fastest")
    with pytest.raises(ops.BackendError, match="SEMIMOE_BACKEND='fastest': choose one of reference, portable, fused"):
        F.multi_gate(*ONE_HEAD)


def test_backend_context_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIMOE_BACKEND", "portable")
    cpu = torch.device("cpu")
    with semimoe_fast.backend("reference"):
        assert ops.implementation("multi_gate", cpu) is reference.multi_gate
        with semimoe_fast.backend("portable"):
            assert ops.implementation("multi_gate", cpu) is portable.multi_gate
        with ThreadPoolExecutor(1) as pool:  # another thread does not see the context
            assert pool.submit(ops.implementation, "multi_gate", cpu).result() is portable.multi_gate
        assert ops.implementation("multi_gate", cpu) is reference.multi_gate
    assert ops.implementation("multi_gate", cpu) is portable.multi_gate
    with pytest.raises(ops.BackendError, match=r"backend\('fastest'\): choose one of reference, portable, fused"):
        semimoe_fast.backend("fastest").__enter__()


def test_backend_context_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        called.append("reference")
        return logits.sum()

    monkeypatch.setattr(reference, "squared_dice_loss", loss)
    compiled = torch.compile(F.squared_dice_loss, fullgraph=True, backend="eager")
    with semimoe_fast.backend("reference"):
        compiled(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4).long())
    assert called == ["reference"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fused multi-gate runs on a GPU")
def test_fused_multi_gate_on_the_cpu_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops._choose_and_log.cache_clear()
    message = (
        r"^the fused backend cannot serve multi_gate on cpu: Triton kernels need a GPU .*; choose another backend$"
    )
    with semimoe_fast.backend("fused"), pytest.raises(ops.BackendError, match=message):
        F.multi_gate(*ONE_HEAD)
    ops._choose_and_log.cache_clear()


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.9.0", "2.4.6", False)]
)
def test_interpreter_of_triton_beside_a_newer_numpy(
    triton: str, numpy: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    reason = _triton._why_no_interpreter.__wrapped__()
    assert reason is None or f"Triton {triton} fails beside NumPy {numpy}" in reason
    assert bool(reason) == fails


def test_empty_environment_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIMOE_BACKEND", "")
    assert F.squared_distance(torch.tensor([[1, 0, 0]])).tolist() == [[1, 1, 4]]
