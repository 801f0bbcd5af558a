"""The fused multi-gate against the float64 reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from operations import exact
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import reference

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(ops.why_not_fused("multi_gate", DEVICE)), reason=str(ops.why_not_fused("multi_gate", DEVICE))
)
HEADS, OWN = (2, 1, 2), (2, 1, 2)
# Relative errors of float32 sums of up to 64 products. Results in bfloat16 and float16 are rounded to 8 and 11 bits;
# gradients of parameters stay float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIMOE_BACKEND", "fused")
    if DEVICE == "cpu":
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", interpreted_dot)


def interpreted_dot(self, a, b, d, *_: object):
    """Triton's interpreter stores bfloat16 as raw bits; its own create_dot would multiply these bits."""
    from triton.runtime.interpreter import TensorHandle

    floats = [self.cast_impl(x, triton.language.float32).data for x in (a, b)]
    return TensorHandle(np.matmul(*floats) + d.data, d.dtype.scalar)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=random).to(DEVICE, dtype).requires_grad_()


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The relative error in the 2-norm. It is NaN, and so fails a comparison, if a value was not written."""
    error = (result.detach().cpu().double() - expected.detach()).norm()
    return (error / expected.detach().norm().clamp(min=1e-12)).item()


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    x = tensor.detach()
    channels, height, width = x.shape[1:]
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "channel slice":
        x = torch.cat([x, x, x], 1)[:, channels : 2 * channels]
    elif layout == "expanded":
        x = x[:, :1].expand(-1, channels, -1, -1)
    elif layout == "crop":
        x = torch.nn.functional.pad(x, (0, 2, 0, 3))[..., :height, :width]
    return x.requires_grad_()


def check_projections(
    shape: tuple[int, int, int, int],
    heads: Sequence[int] = HEADS,
    own: Sequence[int] = OWN,
    dtype: torch.dtype = torch.float32,
    layout: str = "NCHW",
) -> None:
    """Values and all gradients of project_experts."""
    experts = len(own)
    features = [in_layout(draw(*shape, seed=e, dtype=dtype), layout) for e in range(experts)]
    head_weights = [draw(o, shape[1], seed=10 + k) for k, o in enumerate(heads)]
    own_weights = [draw(o, shape[1], seed=20 + e) for e, o in enumerate(own)]
    own_biases = [draw(o, seed=30 + e) for e, o in enumerate(own)]
    inputs = [*features, *head_weights, *own_weights, *own_biases]
    means, projections, predictions = F.project_experts(features, head_weights, own_weights, own_biases)
    # weights rounded as for the tensor cores, so that only the rounding of the results remains
    oracle = exact([*features, *(w.to(dtype) for w in (*head_weights, *own_weights)), *own_biases])
    parts = [oracle[:experts], oracle[experts : -2 * experts], oracle[-2 * experts : -experts], oracle[-experts:]]
    expected = reference.project_experts(*parts)

    outputs, oracles = [means, projections, *predictions], [expected[0], expected[1], *expected[2]]
    gradients = [draw(*output.shape, seed=40, dtype=output.dtype).detach() for output in outputs]
    torch.autograd.backward(outputs, gradients)
    torch.autograd.backward(oracles, [gradient.cpu().double() for gradient in gradients])
    assert [output.dtype for output in outputs] == [torch.float32, *[dtype] * (1 + experts)]
    for output, wanted in zip(outputs, oracles, strict=True):
        assert relative_error(output, wanted) < TOLERANCE[dtype]
    for leaf, wanted in zip(inputs, oracle, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, wanted.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *((torch.float32, layout) for layout in ("NCHW", "channels-last", "channel slice", "crop", "expanded")),
        *((dtype, layout) for dtype in (torch.bfloat16, torch.float16) for layout in ("NCHW", "channels-last")),
    ],
)
def test_project_experts_by_dtype_and_layout(dtype: torch.dtype, layout: str) -> None:
    check_projections((2, 16, 23, 24), dtype=dtype, layout=layout)  # 552 pixels: more than a chunk


def test_experts_with_different_layouts() -> None:
    features = [draw(1, 4, 5, 6, seed=e) for e in range(2)]
    mixed = [features[0], in_layout(features[1], "channels-last")]
    for result, expected in zip(
        F.project_experts(mixed, [draw(2, 4)])[:2], F.project_experts(features, [draw(2, 4)])[:2], strict=True
    ):
        # on a GPU, the order of a sum depends on the layout
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "heads", "own"),
    [
        ((1, 1, 1, 1), (1,), (1,)),
        ((3, 5, 1, 7), (2, 1, 2), (3, 1)),
        ((1, 17, 513, 1), (4, 1, 2), (1, 2, 5)),
        ((2, 64, 16, 32), HEADS, OWN),  # one chunk exactly
        ((1, 3, 31, 33), (9, 1, 8), (1, 1, 1, 3)),  # more than 16 rows
        ((20, 2, 3, 3), HEADS, OWN),
        ((1, 128, 5, 5), HEADS, OWN),
        ((1, 130, 5, 5), HEADS, OWN),  # more channels than the kernel takes
    ],
)
def test_project_experts_by_shape(shape, heads, own) -> None:
    check_projections(shape, heads, own)


def test_planes_beyond_32_bits() -> None:
    """The third channel starts 2^31 elements after the first; most of the memory is never touched."""
    memory = torch.from_numpy(np.empty(2**31 + 512, np.int16)).view(torch.bfloat16)
    far = memory.as_strided((1, 3, 16, 32), (2**31 + 512, 2**30, 32, 1))
    features = draw(1, 3, 16, 32, dtype=torch.bfloat16).detach()
    far.copy_(features)
    weights = [draw(1, 3)]
    if DEVICE == "cuda":
        pytest.skip("the interpreter checks the addresses without 4 GiB of a GPU's memory")
    for near, result in zip(
        F.project_experts([features], weights)[:2], F.project_experts([far], weights)[:2], strict=True
    ):
        torch.testing.assert_close(result, near, rtol=0, atol=0)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3, 4)], ids=["means", "projections", "one own", "two own"])
def test_gradients_if_only_some_results_are_used(used: tuple[int, ...]) -> None:
    features, own = [draw(2, 4, 5, 7, seed=e) for e in range(3)], [draw(o, 4, seed=9 + o) for o in OWN]
    arguments = [*features, draw(2, 4), *own, *(draw(o) for o in OWN)]

    def some(function, tensors: Sequence[Tensor]) -> Tensor:
        means, projections, predictions = function(tensors[:3], [tensors[3]], tensors[4:7], tensors[7:])
        results = [means, projections, *predictions]
        return sum((results[i] * results[i]).sum() for i in used)

    oracle = exact(arguments)
    some(F.project_experts, arguments).backward()
    some(reference.project_experts, oracle).backward()
    for leaf, expected in zip(arguments, oracle, strict=True):
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        wanted = torch.zeros_like(expected) if expected.grad is None else expected.grad
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-4)  # sums of 70 squares


def mix_inputs(
    rows: Sequence[int] = HEADS, experts: int = 3, size: tuple[int, int] = (17, 31), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Projections, gate weights, and one bias vector per task."""
    projections = draw(2, experts, sum(rows), *size, dtype=dtype)
    return [projections, draw(2, len(rows), experts), *(draw(o, seed=5) for o in rows)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "experts", "size"), [(HEADS, 3, (17, 31)), ((1,), 1, (1, 1)), ((3, 1, 4, 2), 4, (32, 64))]
)
def test_mix_projections(rows, experts, size, dtype: torch.dtype) -> None:
    projections, gates, *biases = inputs = mix_inputs(rows, experts, size, dtype)
    oracle = exact(inputs)
    outputs = F.mix_projections(projections, gates, biases)
    expected = reference.mix_projections(oracle[0], oracle[1], oracle[2:])
    gradients = [draw(*output.shape, seed=40, dtype=dtype).detach() for output in outputs]
    torch.autograd.backward(outputs, gradients)
    torch.autograd.backward(expected, [gradient.cpu().double() for gradient in gradients])
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert relative_error(output, wanted) < TOLERANCE[dtype]
    for leaf, wanted in zip(inputs, oracle, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, wanted.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [(2, 1, 2), (4, 1, 3), (1, 1, 1)])
def test_label_projections(rows) -> None:
    projections, gates, *biases = mix_inputs(rows)
    labels = F.label_projections(projections, gates, biases)
    expected = reference.label_projections(projections.cpu(), gates.cpu(), [bias.cpu() for bias in biases])
    assert [label.dtype for label in labels] == [torch.uint8, torch.float32, torch.uint8]
    assert not any(label.requires_grad for label in labels)
    for label, wanted in zip(labels, expected, strict=True):
        torch.testing.assert_close(label.cpu(), wanted, rtol=0, atol=1e-6)  # tanh of float32 sums


def test_labels_of_equal_and_invalid_outputs() -> None:
    """The first of equal maxima wins, and NaN counts as the largest value, as in torch.argmax."""
    random = torch.Generator().manual_seed(0)
    values = torch.tensor([-1.0, 0.0, 1.0, float("inf"), float("nan")])
    projections = values[torch.randint(0, 5, (1, 1, 7, 20, 20), generator=random)].to(DEVICE)
    gates, biases = torch.ones(1, 3, 1, device=DEVICE), [torch.zeros(o, device=DEVICE) for o in (3, 1, 3)]
    labels = F.label_projections(projections, gates, biases)
    for label, logits in zip(labels[::2], (projections[0, :, :3], projections[0, :, 4:]), strict=True):
        torch.testing.assert_close(label, logits.argmax(1).to(torch.uint8), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(value: float) -> None:
    features, heads = [draw(1, 4, 6, 6, seed=e).detach() for e in range(2)], [draw(o, 4).detach() for o in HEADS]
    features[1][0, 2, 3, 4] = value
    gates, biases = torch.rand(1, 3, 2, device=DEVICE), [draw(o).detach() for o in HEADS]
    cpu = [[x.cpu() for x in part] for part in (features, heads, biases)]
    expected = reference.multi_gate(cpu[0], gates.cpu(), cpu[1], cpu[2])
    for result, oracle in zip(F.multi_gate(features, gates, heads, biases), expected, strict=True):
        torch.testing.assert_close(result.cpu(), oracle, rtol=1e-5, atol=1e-5, equal_nan=True)
    labels = F.pseudo_labels(features, gates, heads, biases)
    wanted = reference.pseudo_labels(cpu[0], gates.cpu(), cpu[1], cpu[2])
    for label, oracle in zip(labels, wanted, strict=True):
        torch.testing.assert_close(label.cpu(), oracle, rtol=1e-5, atol=1e-5, equal_nan=True)
    means = F.project_experts(features, heads)[0]
    torch.testing.assert_close(means.cpu(), torch.stack([x.mean((2, 3)) for x in cpu[0]], 1), equal_nan=True)


def test_multi_gate_and_pseudo_labels() -> None:
    features, gates = [draw(2, 6, 9, 11, seed=e) for e in range(3)], draw(2, 3, 3)
    heads, biases = [draw(o, 6, seed=o) for o in HEADS], [draw(o) for o in HEADS]
    arguments = [*features, gates, *heads, *biases]
    oracle = exact(arguments)
    outputs = F.multi_gate(features, gates, heads, biases)
    expected = reference.multi_gate(oracle[:3], oracle[3], oracle[4:7], oracle[7:])
    sum(output.square().sum() for output in outputs).backward()
    sum(output.square().sum() for output in expected).backward()
    for leaf, wanted in zip(arguments, oracle, strict=True):
        assert relative_error(leaf.grad, wanted.grad) < 1e-5  # two passes of float32
    labels = F.pseudo_labels(features, gates, heads, biases)
    for label, wanted in zip(
        labels, reference.pseudo_labels(oracle[:3], oracle[3], oracle[4:7], oracle[7:]), strict=True
    ):
        torch.testing.assert_close(label.cpu(), wanted.to(label.dtype), rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal() -> None:
    features, heads = [draw(2, 8, 40, 40, seed=e) for e in range(2)], [draw(3, 8)]
    runs = []
    for _ in range(2):
        means, projections, _ = F.project_experts(features, heads)
        loss = means.square().sum() + projections.square().sum()
        runs.append(torch.autograd.grad(loss, [*features, *heads]))
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_empty_batch() -> None:
    means, projections, own = F.project_experts([draw(0, 4, 5, 5)], [draw(2, 4)], [draw(1, 4)], [draw(1)])
    assert (means.shape, projections.shape, own[0].shape) == ((0, 1, 4), (0, 1, 2, 5, 5), (0, 1, 5, 5))
    (means.sum() + projections.sum() + own[0].sum()).backward()


def test_float64_stays_float64() -> None:
    features = [draw(1, 4, 5, 7, seed=e, dtype=torch.float64) for e in range(2)]
    heads, gates = [draw(o, 4, dtype=torch.float64) for o in HEADS], draw(1, 3, 2, dtype=torch.float64)
    biases = [draw(o, dtype=torch.float64) for o in HEADS]
    expected = reference.multi_gate(features, gates, heads, biases)
    for result, oracle in zip(F.multi_gate(features, gates, heads, biases), expected, strict=True):
        torch.testing.assert_close(result, oracle, rtol=1e-13, atol=1e-13)


def test_second_derivatives_are_refused() -> None:
    features, heads, gates = [draw(1, 4, 5, 7)], [draw(2, 4)], draw(1, 1, 1)
    (out,) = F.multi_gate(features, gates, heads, [draw(2)])
    (first,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def test_custom_ops_pass_opcheck() -> None:
    """torch.compile relies on fake implementations, schemas and autograd formulas."""
    ops = torch.ops.semimoe_fast  # the namespace of custom ops, not semimoe_fast.ops
    features, weights, biases = [draw(1, 4, 5, 6, seed=e) for e in range(2)], draw(6, 4), draw(3)
    gradients = [draw(1, 2, 4), draw(1, 2, 3, 5, 6), [draw(1, rows, 5, 6) for rows in (1, 2)]]
    for fused in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):  # dtype of the parameters
            parameters = weights.detach().to(dtype).requires_grad_(), biases.detach().to(dtype).requires_grad_()
            torch.library.opcheck(ops.project_experts.default, (features, *parameters, [1, 2], fused))
            arguments = (features, parameters[0], [1, 2], *gradients, fused)
            torch.library.opcheck(
                ops.project_experts_gradients.default, arguments, test_utils=("test_schema", "test_faketensor")
            )
    channels_last = [in_layout(x, "channels-last") for x in features]
    torch.library.opcheck(ops.project_experts.default, (channels_last, weights, biases, [1, 2], True))
    projections, gates, gated_gradients = draw(1, 2, 3, 5, 6), draw(1, 2, 2), [draw(1, rows, 5, 6) for rows in (1, 2)]
    torch.library.opcheck(ops.mix_projections.default, (projections, gates, draw(3), [1, 2]))
    torch.library.opcheck(
        ops.mix_projections_gradients.default,
        (projections, gates, gated_gradients),
        test_utils=("test_schema", "test_faketensor"),
    )
    labels = (draw(1, 2, 4, 5, 6).detach(), draw(1, 3, 2).detach(), draw(4).detach(), 2)
    torch.library.opcheck(ops.label_projections.default, labels)


def test_compiled_equals_eager() -> None:
    features, heads, own = [draw(2, 4, 6, 7, seed=e) for e in range(3)], [draw(o, 4) for o in HEADS], [draw(2, 4)] * 3
    gates, biases = draw(2, 3, 3), [draw(o) for o in HEADS]

    def step(features: list[Tensor]) -> Tensor:
        means, projections, predictions = F.project_experts(features, heads, own, [biases[0]] * 3)
        mixed = F.mix_projections(projections, gates * means.mean(), biases)
        _, sdf, _ = F.label_projections(projections.detach(), gates, biases)
        return sum(x.square().sum() for x in (*mixed, *predictions)) + sdf.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), step(features))
    gradients = torch.autograd.grad(compiled(features), [*features, *heads])
    for result, expected in zip(gradients, torch.autograd.grad(step(features), [*features, *heads]), strict=True):
        torch.testing.assert_close(result, expected)
