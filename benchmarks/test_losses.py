"""The three objectives of one and of two sets of predictions, at the sizes of a training step.

Beside the backends stands torch.compile of the reference, the peer that needs no code of ours. In `extra_info`, on a
GPU, peak_bytes is what a call allocates at most beyond its inputs.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast import reference

ROUNDS = 50


@pytest.fixture(params=["reference", "reference compiled", "portable", "fused"])
def joint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device):
    """joint_objective_terms as one provider computes it."""
    if request.param == "fused" and device.type == "cpu":
        pytest.skip("on the CPU, Triton's interpreter is for tests")
    if request.param != "reference compiled":
        monkeypatch.setenv("SEMIMOE_BACKEND", request.param)
        return F.joint_objective_terms
    if device.type == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    return torch.compile(reference.joint_objective_terms, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("sets", [1, 2], ids=["objective_terms", "joint"])
def test_objective_terms(benchmark, joint, device: torch.device, sets: int, batch: int, direction: str) -> None:
    benchmark.group = (
        f"objective of {'one set' if sets == 1 else 'two sets'}, {direction}, {batch} x 256 x 256, {device.type}"
    )
    flat = [torch.randn(batch, rows, 256, 256, device=device) for _ in range(sets) for rows in (2, 1, 2)]
    mask = torch.randint(0, 2, (batch, 256, 256), dtype=torch.uint8, device=device)
    targets = (mask, torch.rand(batch, 256, 256, device=device) * 2 - 1, 1 - mask)
    upstream = torch.tensor([1.0, -2.0, 0.5], device=device)

    def forward(tensors: list[torch.Tensor] = flat) -> torch.Tensor:
        return joint([tensors[s : s + 3] for s in range(0, 3 * sets, 3)], *targets)

    def backward(terms: torch.Tensor) -> None:
        torch.autograd.grad(terms, flat, upstream)

    # float32 sums of 65,536 probabilities, in the order of each provider; gradients by their largest entry
    exact = [x.double().requires_grad_() for x in flat]
    sdf = targets[1].double()
    expected = reference.joint_objective_terms([exact[s : s + 3] for s in range(0, 3 * sets, 3)], mask, sdf, targets[2])
    for x in flat:
        x.requires_grad_(direction != "forward")
    terms = forward()
    torch.testing.assert_close(terms.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    if direction != "forward":
        gradients = torch.autograd.grad(terms, flat, upstream)
        for gradient, oracle in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
            torch.testing.assert_close(gradient.double(), oracle, rtol=0, atol=1e-4 * oracle.abs().max().item())
        del gradients, gradient, oracle
    del terms, expected, exact, sdf

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def prepare() -> tuple[tuple[torch.Tensor, ...], dict]:
        terms = (forward(),) if direction == "backward" else ()
        synchronize()
        return terms, {}

    def timed(*terms: torch.Tensor) -> None:
        if direction == "forward":
            forward()
        else:
            backward(*(terms or (forward(),)))
        synchronize()

    if device.type == "cuda":
        arguments, _ = prepare()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(*arguments)
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        del arguments
    benchmark.pedantic(timed, setup=prepare, rounds=ROUNDS, warmup_rounds=5)
