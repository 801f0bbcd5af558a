"""Every operation and backend against the golden archives and the float64 reference; gradients, layouts, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.model import MultiGating
from semimoe_fast.ops import portable, reference
from semimoe_fast.published import rename_gating

BACKENDS = ("reference", "portable")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOSSES = ("squared_dice_loss", "soft_dice_loss")
NEEDS_TRITON = pytest.mark.skipif(bool(ops.why_not_fused("multi_gate", DEVICES[-1])), reason="Triton cannot serve here")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SEMIMOE_BACKEND", request.param)
    return request.param


def gate_inputs(
    batch: int = 2,
    experts: int = 3,
    heads: tuple[int, ...] = (2, 1, 2),
    channels: int = 5,
    size: tuple[int, int] = (4, 6),
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Random float64 arguments of multi_gate with requires_grad."""
    random = torch.Generator().manual_seed(batch + 10 * experts + 100 * len(heads) + 1000 * channels)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    features = [randn(batch, channels, *size) for _ in range(experts)]
    return features, randn(batch, len(heads), experts), [randn(o, channels) for o in heads], [randn(o) for o in heads]


def flat(arguments: tuple) -> list[Tensor]:
    features, gates, weights, biases = arguments
    return [*features, gates, *weights, *biases]


def cast(arguments: tuple, convert) -> tuple:
    """Convert each tensor of the arguments of multi_gate to a new leaf with requires_grad."""
    features, gates, weights, biases = arguments

    def leaf(tensor: Tensor) -> Tensor:
        return convert(tensor.detach()).requires_grad_()

    return [leaf(x) for x in features], leaf(gates), [leaf(w) for w in weights], [leaf(b) for b in biases]


# golden archives


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("fused", marks=NEEDS_TRITON)], indirect=True)
@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_gating(case: str, backend: str, golden) -> None:
    """Gates, outputs and every gradient of the published gating module (dropout off)."""
    device = DEVICES[-1]
    archive = {key: torch.from_numpy(value).to(device) for key, value in golden("gating").items()}
    gating = MultiGating(64, 3, (2, 1, 2), dropout=0.0).to(device)
    parameters = {k.removeprefix("param/"): v for k, v in archive.items() if k.startswith("param/")}
    gating.load_state_dict({rename_gating(k): v for k, v in parameters.items()})
    features = archive[f"{case}/features"].requires_grad_()
    *outputs, gates = gating(features.split(64, 1))

    # float32 sums of 192 terms, in another order than the published code's
    close = {"rtol": 1e-4, "atol": 1e-5}
    tasks = ("mask", "sdf", "boundary")
    for k, task in enumerate(tasks):
        torch.testing.assert_close(outputs[k].detach(), archive[f"{case}/out_{task}"], **close)
        torch.testing.assert_close(gates[:, k].detach(), archive[f"{case}/gate_{task}"], **close)
    torch.autograd.backward(outputs, [archive[f"{case}/grad_out_{task}"] for task in tasks])
    torch.testing.assert_close(features.grad, archive[f"{case}/grad_features"], **close)
    ours = dict(gating.named_parameters())
    for key in parameters:
        expected = archive[f"{case}/grad_param/{key}"]
        scale = expected.abs().max().item()  # sums over all pixels cancel: the largest entry sets the rounding error
        close = {"rtol": 1e-4, "atol": 1e-5 * scale}
        torch.testing.assert_close(
            ours[rename_gating(key)].grad, expected, **close, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_losses(case: str, backend: str, golden) -> None:
    archive = {
        k.removeprefix(f"{case}/"): torch.from_numpy(v) for k, v in golden("losses").items() if k.startswith(case)
    }
    terms = []
    for loss, logits, target, name in (
        (F.squared_dice_loss, "seg_logits", "target", "seg_dice"),
        (F.tanh_mse_loss, "sdf_raw", "sdf_target", "sdf_mse"),
        (F.soft_dice_loss, "boundary_logits", "boundary_target", "boundary_dice"),
    ):
        prediction = archive[logits].clone().requires_grad_()
        value = loss(prediction, archive[target])
        value.backward()
        terms.append(value.detach())
        # float32 sums of up to 4,096 terms against the published float32 sums
        torch.testing.assert_close(value.detach().double(), archive[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prediction.grad, archive[f"{name}_grad"], rtol=1e-4, atol=1e-8)
    log_vars = archive["log_vars"].clone().requires_grad_()
    total = F.adaptive_loss(torch.stack(terms), log_vars)
    total.backward()
    torch.testing.assert_close(total.detach().double(), archive["total"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_vars.grad, archive["log_vars_grad"], rtol=1e-5, atol=1e-6)


# against the float64 reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 64), (torch.float32, 64), (torch.bfloat16, 4)])
def test_multi_gate_equals_reference(
    dtype: torch.dtype, roundings: int, layout: torch.memory_format, device: str
) -> None:
    """A result is a sum of at most 48 products. For bfloat16 the sum is in float32 and three values are rounded."""
    arguments = cast(gate_inputs(), lambda t: t.to(device, dtype).contiguous())
    features = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in arguments[0]]
    arguments = (features, *arguments[1:])
    random = torch.Generator().manual_seed(0)
    weighting = [torch.randn(2, o, 4, 6, generator=random).to(device, dtype) for o in (2, 1, 2)]

    def run(function, convert) -> list[Tensor]:
        leaves = cast(arguments, convert)
        outputs = function(*leaves)
        torch.autograd.backward(outputs, [convert(w) for w in weighting])
        return [*outputs, *(leaf.grad for leaf in flat(leaves))]

    results = run(F.multi_gate, lambda t: t)
    exact = run(reference.multi_gate, lambda t: t.cpu().double())
    magnitude = run(reference.multi_gate, lambda t: t.cpu().double().abs())  # rounding errors scale with it
    for result, expected, scale in zip(results, exact, magnitude, strict=True):
        assert result.dtype == dtype
        assert ((result.cpu().double() - expected).abs() <= roundings * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_with_float32_gates(dtype: torch.dtype, device: str) -> None:
    """Under autocast, features, folded weights and results have 11 or 8 bits, and sums are in float32."""
    features, *rest = cast(gate_inputs(), lambda t: t.to(device, torch.float32))
    half = [x.to(dtype) for x in features]
    results, labels = F.multi_gate(half, *rest), F.pseudo_labels(half, *rest)
    exact = cast((half, *rest), lambda t: t.cpu().double())
    magnitude = reference.multi_gate(*cast(exact, torch.abs))
    for result, expected, scale in zip(results, reference.multi_gate(*exact), magnitude, strict=True):
        assert result.dtype == dtype
        assert ((result.cpu().double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale).all()
    error = (labels[1].cpu().double() - reference.pseudo_labels(*exact)[1]).abs()  # tanh has slopes up to 1
    assert (error <= 3 * torch.finfo(dtype).eps * magnitude[1].clamp(min=1)).all()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    experts=st.integers(1, 4),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    channels=st.integers(1, 9),
    height=st.sampled_from([1, 2, 7, 8, 9, 17]),
    width=st.sampled_from([1, 3, 15, 16]),
)
def test_multi_gate_over_shapes(batch, experts, heads, channels, height, width) -> None:
    arguments = gate_inputs(batch, experts, tuple(heads), channels, (height, width))
    for result, expected in zip(F.multi_gate(*arguments), reference.multi_gate(*arguments), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)  # float64 against float64


def test_pseudo_labels_equal_reference_and_carry_no_gradient() -> None:
    arguments = gate_inputs(size=(16, 16))
    results = F.pseudo_labels(*arguments)
    for result, expected in zip(results, reference.pseudo_labels(*arguments), strict=True):
        assert not result.requires_grad
        torch.testing.assert_close(result, expected)
    assert [r.dtype for r in results] == [torch.uint8, torch.float64, torch.uint8]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 5),
    height=st.sampled_from([1, 5, 8, 17]),
    width=st.sampled_from([1, 4, 13]),
    seed=st.integers(0, 2**16),
)
def test_losses_over_shapes(batch, classes, height, width, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, height, width, dtype=torch.float64, generator=random)
    target = torch.randint(0, classes, (batch, height, width), generator=random)
    raw, sdf = logits[:, :1], torch.rand(batch, height, width, dtype=torch.float64, generator=random) * 2 - 1
    for name in LOSSES:
        check_loss(name, logits, target)
    check_loss("tanh_mse_loss", raw, sdf)
    check_loss("tanh_mse_loss", raw, sdf[:, None])


def check_loss(name: str, prediction: Tensor, target: Tensor) -> None:
    """Portable in float64 and float32, value and gradient, against the reference in float64."""
    expected_input = prediction.clone().requires_grad_()
    expected = getattr(reference, name)(expected_input, target)
    expected.backward()
    # float32: probabilities carry 1e-7, sums of up to 221 of them 1e-6; gradients divide by sums of at least 1
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        leaf = prediction.detach().to(dtype, copy=True).requires_grad_()
        value = getattr(F, name)(leaf, target.to(dtype) if target.is_floating_point() else target)
        value.backward()
        torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(leaf.grad.double(), expected_input.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_propagate_nan_and_infinity(name: str, channel: int, value: float) -> None:
    logits = torch.randn(2, 2, 4, 4)
    logits[1, channel, 2, 2] = value
    target = torch.zeros(2, 4, 4, dtype=torch.uint8)
    assert getattr(F, name)(logits, target).isnan()
    assert getattr(reference, name)(logits, target).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_minus_infinity_gives_probability_zero(name: str) -> None:
    logits = torch.randn(2, 2, 4, 4).double()
    logits[0, 0], logits[1, 1, 2, 2] = -torch.inf, -torch.inf
    check_loss(name, logits, torch.zeros(2, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("name", LOSSES)
def test_absent_class_with_tiny_probabilities(name: str) -> None:
    """If no pixel has a class, soft Dice depends on sums of probabilities as small as its smoothing term, 1e-8."""
    logits = torch.zeros(1, 2, 8, 8).double()
    logits[:, 0] = torch.linspace(18, 30, 64).view(8, 8)
    check_loss(name, logits, torch.zeros(1, 8, 8, dtype=torch.uint8))
    check_loss(name, -logits, torch.ones(1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("name", LOSSES)
def test_targets_out_of_range_belong_to_no_class(name: str) -> None:
    check_loss(name, torch.randn(2, 2, 5, 6).double(), torch.randint(-2, 4, (2, 5, 6)))
    check_loss(name, torch.randn(2, 3, 5, 6).double(), torch.full((2, 5, 6), 2**33))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_accumulate_in_float32(dtype: torch.dtype) -> None:
    """A sum of 65,536 probabilities overflows in float16 and stalls in bfloat16, but not in float32."""
    logits = torch.randn(1, 2, 256, 256).to(dtype)
    target = torch.randint(0, 2, (1, 256, 256))
    for name in LOSSES:
        expected = getattr(reference, name)(logits.double(), target)
        # both sides use the same rounded logits, so they differ only by float32 sums of 65,536 terms
        torch.testing.assert_close(getattr(F, name)(logits, target).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_targets_of_any_integer_type(dtype: torch.dtype, device: str, backend: str) -> None:
    logits = torch.randn(2, 2, 5, 7, device=device)
    target = torch.randint(0, 2, (2, 5, 7), device=device)
    for name in LOSSES:
        expected = getattr(F, name)(logits, target)
        torch.testing.assert_close(getattr(F, name)(logits, target.to(dtype)), expected, rtol=0, atol=0)


def test_float_targets_of_zeros_and_ones_with_a_channel(backend: str) -> None:
    """MONAI gives labels as float32 (B, 1, H, W)."""
    predictions = torch.randn(2, 2, 5, 7), torch.randn(2, 1, 5, 7), torch.randn(2, 2, 5, 7)
    mask, sdf = torch.randint(0, 2, (2, 5, 7)), torch.rand(2, 5, 7)
    label = mask[:, None].float()
    exactly = {"rtol": 0, "atol": 0}
    for name in LOSSES:
        loss = getattr(F, name)
        torch.testing.assert_close(loss(predictions[0], label), loss(predictions[0], mask), **exactly)
    expected = F.objective_terms(*predictions, mask, sdf, mask)
    torch.testing.assert_close(F.objective_terms(*predictions, label, sdf[:, None], label), expected, **exactly)
    joint = F.joint_objective_terms([predictions] * 2, label, sdf[:, None], label)
    torch.testing.assert_close(joint, F.joint_objective_terms([predictions] * 2, mask, sdf, mask), **exactly)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_losses_in_float32(device: str) -> None:
    logits, target = torch.randn(2, 3, 32, 32, device=device), torch.randint(0, 3, (2, 32, 32), device=device)
    for name in LOSSES:
        expected = getattr(F, name)(logits, target)
        with torch.autocast(device, torch.bfloat16):
            torch.testing.assert_close(getattr(F, name)(logits, target), expected, rtol=0, atol=0)


def test_objective_terms_are_the_three_losses(backend: str) -> None:
    mask_logits, raw, boundary_logits = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)
    mask, boundary = torch.randint(0, 3, (2, 8, 8)), torch.randint(0, 2, (2, 8, 8))
    sdf = torch.rand(2, 8, 8)
    terms = F.objective_terms(mask_logits, raw, boundary_logits, mask, sdf, boundary)
    expected = [
        F.squared_dice_loss(mask_logits, mask),
        F.tanh_mse_loss(raw, sdf),
        F.soft_dice_loss(boundary_logits, boundary),
    ]
    torch.testing.assert_close(terms, torch.stack(expected))


def test_joint_objective_terms_are_a_sum(backend: str) -> None:
    predictions = [(torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)) for _ in range(3)]
    targets = (torch.randint(0, 3, (2, 8, 8)), torch.rand(2, 8, 8), torch.randint(0, 2, (2, 8, 8)))
    expected = sum(F.objective_terms(*prediction, *targets) for prediction in predictions)
    torch.testing.assert_close(F.joint_objective_terms(predictions, *targets), expected)


def test_gradients_keep_the_dtype_of_the_logits() -> None:
    logits = torch.randn(2, 3, 4, 5).bfloat16().requires_grad_()
    for name in LOSSES:
        (gradient,) = torch.autograd.grad(getattr(F, name)(logits, torch.zeros(2, 4, 5).long()), logits)
        assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 2, 0, 4), (2, 3, 4, 0)])
def test_losses_of_empty_batches_equal_the_reference(shape: tuple[int, ...]) -> None:
    logits, target = torch.zeros(shape), torch.zeros(shape[0], *shape[2:]).long()
    for name in LOSSES:
        expected = getattr(reference, name)(logits, target)
        torch.testing.assert_close(getattr(F, name)(logits, target), expected, equal_nan=True)


@pytest.mark.parametrize("module", [reference, portable])
def test_second_derivatives_of_losses(module) -> None:
    logits = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    for name in LOSSES:
        assert torch.autograd.gradgradcheck(getattr(module, name), (logits, torch.randint(0, 2, (1, 2, 3))))


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_adaptive_loss_of_any_number_of_terms(tasks: int) -> None:
    terms, log_vars = torch.rand(tasks).double(), torch.randn(tasks).double()
    coefficients = [0.5 + k for k in range(tasks)]
    expected = reference.adaptive_loss(terms, log_vars, coefficients, 0.3)
    torch.testing.assert_close(F.adaptive_loss(terms, log_vars, coefficients, 0.3), expected)
    mixed = F.adaptive_loss(terms, log_vars.float(), coefficients, 0.3)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)  # log_vars rounded to float32


# gradcheck and compile


@pytest.mark.parametrize("module", [reference, portable])
def test_gradcheck_gates(module) -> None:
    features, gates, weights, biases = gate_inputs(2, 2, (2, 1), 3, (2, 3))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return module.multi_gate(tensors[:2], tensors[2], tensors[3:5], tensors[5:])

    assert torch.autograd.gradcheck(function, [*features, gates, *weights, *biases])


@pytest.mark.parametrize("module", [reference, portable])
def test_gradcheck_losses(module) -> None:
    logits = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 3, 2))
    for name in LOSSES:
        assert torch.autograd.gradcheck(getattr(module, name), (logits, target))
        assert torch.autograd.gradcheck(getattr(module, name), (logits[:, :2], target))
    raw = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: module.joint_objective_terms([(x[0], raw, x[1]), (x[0], raw, x[1])], target, raw[:, 0], target),
        (logits, logits[:, :2].detach().clone().requires_grad_()),
    )
    assert torch.autograd.gradcheck(module.tanh_mse_loss, (raw, torch.rand(2, 3, 2, dtype=torch.float64)))
    terms, log_vars = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module.adaptive_loss, (terms, log_vars))


def test_operations_compile_without_graph_breaks() -> None:
    arguments = cast(gate_inputs(), lambda t: t.float())
    mask = torch.rand(2, 4, 6) > 0.5

    def step(features, gates, weights, biases, mask: Tensor) -> Tensor:
        sdf, boundary = F.distance_targets(mask)
        gated = F.multi_gate(features, gates, weights, biases)
        return F.adaptive_loss(F.objective_terms(*gated, mask.to(torch.uint8), sdf, boundary), torch.ones(3))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, mask), step(*arguments, mask))
