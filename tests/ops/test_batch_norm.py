"""Batch normalization and ReLU of every backend that runs on the CPU, against the float64 reference and nn.BatchNorm2d.

test_batch_norm_triton.py tests the Triton kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from operations import NoGradient
from torch import Tensor, nn

import semimoe_fast
from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import _native, _native_batch_norm, batch_norm, portable, reference

LAYOUTS = ("NCHW", "channels-last", "crop", "channel slice")
# Relative errors in the 2-norm. bfloat16 and float16 round results to 8 and 11 bits; statistics and sums are float32,
# or double in the compiled module. Float32: 2^-24 for each of about ten operations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}

pytestmark = pytest.mark.usefixtures("default_backend")


class Case(NamedTuple):
    x: Tensor  # (B, C, H, W)
    weight: Tensor  # (C,), as all below
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """Leaves and buffers of another dtype; the layout of x is kept."""
        x, *parameters = (t.detach().to(dtype).clone().requires_grad_() for t in self[:3])
        return Case(x, *parameters, *(t.to(dtype).clone() for t in self[3:]))


def draw(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "NCHW", mean: float = 0.0) -> Case:
    """Random feature maps whose channels have different deviations, and running statistics."""
    random = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]

    def positive() -> Tensor:
        return 0.5 + torch.rand(channels, generator=random)

    x = (torch.randn(shape, generator=random) * positive()[:, None, None] + mean).to(dtype)
    weight, bias = positive(), torch.randn(channels, generator=random)
    running_mean, running_var = torch.randn(channels, generator=random), positive()
    return Case(in_layout(x, layout), weight, bias, running_mean, running_var)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "crop":
        return nn.functional.pad(x, (0, 2, 0, 3))[..., : x.shape[2], : x.shape[3]]
    if layout == "channel slice":
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :]
    return x


def run(backend: str, case: Case, grad_output: Tensor, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
    """y, the gradients of x, weight and bias, and running mean and variance; on copies of the case."""
    leaves = case.x.detach().requires_grad_(), *(t.clone().requires_grad_() for t in case[1:3])
    copy = Case(*leaves, *(t.clone() for t in case[3:])) if dtype is None else case.to(dtype)
    x, weight, bias, *statistics = copy
    with semimoe_fast.backend(backend):
        y = F.batch_norm_relu(x, weight, bias, *statistics, **options)
    gradients = torch.autograd.grad(y, [x, weight, bias], grad_output.to(y.dtype))
    return [y.detach(), *gradients, *statistics]


def decided_gradient(case: Case, threshold: float = 1e-4, **options) -> Tensor:
    """A random grad_output, but 0 where the result before ReLU is so near to 0 that rounding decides its sign."""
    exact = case.to(torch.float64)
    minus = exact._replace(weight=-exact.weight, bias=-exact.bias)
    y, other = (
        reference.batch_norm_relu(c.x, c.weight, c.bias, c.running_mean.clone(), c.running_var.clone(), **options)
        for c in (exact, minus)
    )
    grad_output = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(y + other > threshold, grad_output, 0).to(case.x.dtype)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The relative error in the 2-norm. It is NaN, and so fails a comparison, if a value was not written."""
    return ((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def check(backend: str, case: Case, **options) -> None:
    """All results against the reference in float64."""
    dtype = case.x.dtype
    grad_output = decided_gradient(case, **options)
    results = run(backend, case, grad_output, torch.float64 if dtype == torch.float64 else None, **options)
    expected = run("reference", case, grad_output, torch.float64, **options)
    assert results[0].dtype == results[1].dtype == dtype
    for i, (result, oracle) in enumerate(zip(results, expected, strict=True)):
        tolerance = TOLERANCE[dtype if i < 2 else torch.promote_types(dtype, torch.float32)]
        assert relative_error(result, oracle) <= tolerance, (backend, i, options, case.x.shape, case.x.stride())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["portable", "fused"])
def test_equals_the_reference(backend: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        for groups in (1, 2, 4):
            check(backend, draw(8, 6, 9, 7, dtype=dtype, layout=layout), groups=groups)
        check(backend, draw(4, 5, 8, 8, dtype=dtype, layout=layout), training=False)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("backend", ["reference", "portable", "fused"])
def test_groups_are_calls_of_batch_norm_2d(backend: str, momentum: float, groups: int) -> None:
    """Outputs, gradients and running statistics."""
    case = draw(6, 5, 4, 3).to(torch.float64)
    grad_output = torch.randn(case.x.shape, dtype=torch.float64)
    module = nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    names = ("weight", "bias", "running_mean", "running_var")
    module.load_state_dict(dict(zip(names, case[1:], strict=True)), strict=False)
    x = case.x.detach().clone().requires_grad_()
    y = torch.cat([module(part).relu() for part in x.chunk(groups)])
    gradients = torch.autograd.grad(y, [x, module.weight, module.bias], grad_output)
    state = [module.running_mean, module.running_var]
    results = run(backend, case, grad_output, torch.float64, momentum=momentum, groups=groups)
    for result, expected in zip(results, [y.detach(), *gradients, *state], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)  # float64 against float64


SHAPES = [
    *((2, channels, 11, 13) for channels in (1, 2, 3, 8, 17, 24, 64, 100)),
    (2, 3, 1, 5),
    (2, 1030, 3, 3),  # more channels than a tile of sums
    (1, 1, 257, 300),  # more than a piece of memory, with a rest
    (2, 48, 151, 149),  # results that are written past the caches, aligned and not
]


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def test_shapes_of_the_compiled_module(layout: str, instruction_set: str) -> None:
    for shape in SHAPES:
        check("fused", draw(*shape, layout=layout))


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def test_half_precision_of_the_compiled_module(layout: str, instruction_set: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check("fused", draw(4, 24, 20, 15, dtype=dtype, layout=layout), groups=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number(dtype: torch.dtype, instruction_set: str) -> None:
    """Products of all 65,536 numbers, rounded as PyTorch does: subnormal numbers, infinities and NaN too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 256, 256)
    zero, one = torch.zeros(1), torch.ones(1)
    for scale in (1.0, 0.3, 1.1, 2.0**-9 * 1.7, 2.0**-130):
        y = _native_batch_norm.batch_norm_relu_eval(x, one * scale, zero, zero, one)
        assert torch.equal(y.nan_to_num(-1.0), (x.float() * scale).relu().to(dtype).nan_to_num(-1.0))
        assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def test_large_means(layout: str, instruction_set: str) -> None:
    """x = 10,000 + noise. The mean is stored as float32, so it may be off by half a unit in the last place.

    The portable backend is less accurate here, because PyTorch sums in float32.
    """
    case = draw(4, 16, 40, 40, layout=layout, mean=1e4)
    half_unit = 2.0**-11  # of 10,000
    grad_output = decided_gradient(case, threshold=4 * half_unit)
    y, grad_x, grad_weight, _, mean, variance = run("fused", case, grad_output, momentum=1.0)
    exact = run("reference", case, grad_output, torch.float64, momentum=1.0)
    assert ((mean - exact[4]).abs() <= half_unit).all()
    assert relative_error(variance, exact[5]) <= 1e-6
    slope = (case.weight / exact[5].sqrt())[:, None, None]
    assert ((y - exact[0]).abs() <= slope * half_unit + 1e-5).all()
    assert relative_error(grad_x, exact[1]) <= 2 * half_unit  # deviations are at least 0.5
    sums = exact[3].abs() / exact[5].sqrt()  # xhat is off by half a unit in every pixel
    assert ((grad_weight - exact[2]).abs() <= 1.01 * half_unit * sums + 1e-3).all()


def test_large_means_with_an_outlier(instruction_set: str) -> None:
    """The first pixel is far from all others, a bad origin of differences: 6 bits of its block's float32 are lost."""
    case = draw(4, 16, 40, 40, layout="channels-last", mean=1e4)
    case.x[0, :, 0, 0] = 0
    *_, mean, variance = run("fused", case, torch.zeros(case.x.shape), momentum=1.0)
    exact = run("reference", case, torch.zeros(case.x.shape), torch.float64, momentum=1.0)
    assert ((mean - exact[4]).abs() <= 2.0**-11 + 1e-3).all()  # 64 float32 sums of 10,000, among 6,400
    assert relative_error(variance, exact[5]) <= 2.0**6 * 8 * 2.0**-24  # 64 additions round as 8


def test_threads_do_not_change_the_result(instruction_set: str) -> None:
    for layout in ("NCHW", "channels-last"):
        case = draw(4, 9, 130, 170, layout=layout)  # enough elements for threads
        grad_output = torch.randn(case.x.shape)
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run("fused", case, grad_output, groups=2))
        for result in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_nan_and_infinity_stay_in_their_channel_and_group(instruction_set: str) -> None:
    for layout in ("NCHW", "channels-last"):
        for value in (torch.nan, torch.inf):
            case = draw(4, 3, 5, 7, layout=layout)
            case.x[3, 1, 4, 6] = value
            y, grad_x, *_ = run("fused", case, torch.ones(case.x.shape), groups=2)
            for result in (y, grad_x):
                assert result[2:, 1].isnan().all()
                assert not result[:2].isnan().any()
                assert not result[:, ::2].isnan().any()


def test_constant_channels(instruction_set: str) -> None:
    """Their variance is 0, and so are their running variance at momentum 1 and their gradient."""
    case = draw(2, 4, 5, 6)
    case.x[:] = torch.tensor([0.0, 1.0, 1e4, -3.3e7])[:, None, None]
    y, grad_x, _, _, mean, variance = run("fused", case, torch.ones(case.x.shape), momentum=1.0)
    assert torch.equal(y, case.bias.relu()[:, None, None].expand_as(y))
    assert torch.equal(mean, case.x[0, :, 0, 0])
    assert ((variance >= 0) & (variance < 1e-10)).all()  # deviation^2 - eps, both 1e-5
    assert (grad_x.abs() < 1e-3).all()  # the rounding of 1 - mean of ones, times 1.5 / sqrt(eps)


@pytest.mark.parametrize("backend", ["reference", "portable", "fused"])
def test_evaluation_keeps_the_statistics(backend: str) -> None:
    case = draw(3, 5, 4, 4)
    before = [t.clone() for t in case[3:]]
    with semimoe_fast.backend(backend), torch.no_grad():
        y = F.batch_norm_relu(*case, groups=2, training=False)
        assert all(torch.equal(x, y) for x, y in zip(case[3:], before, strict=True))
        expected = nn.functional.batch_norm(case.x, *before[:2], case.weight, case.bias).relu()
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # a few roundings
        assert F.batch_norm_relu(case.x[:0], *case[1:5], training=False).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_evaluation_repeats_training_bit_for_bit(dtype: torch.dtype, instruction_set: str) -> None:
    """With the statistics of each group, as `--recompute` calls it."""
    for layout in LAYOUTS:
        for shape in ((4, 6, 9, 7), (4, 24, 151, 149)):  # the second is written past the caches
            x, weight, bias = draw(*shape, dtype=dtype, layout=layout)[:3]
            for groups in (1, 2, 4):
                y, *statistics = batch_norm._normalize(x, weight, bias, 1e-5, groups)
                again = batch_norm._evaluate(x, weight, bias, *statistics)
                assert torch.equal(again, y)
                assert again.stride() == y.stride()


@pytest.mark.parametrize("backend", ["reference", "portable", "fused"])
def test_without_running_statistics(backend: str) -> None:
    case = draw(2, 3, 4, 4)
    with semimoe_fast.backend(backend):
        y = F.batch_norm_relu(*case[:3], None, None)
        assert torch.equal(y, F.batch_norm_relu(*case))


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
@pytest.mark.parametrize("backend", ["portable", "fused"])
def test_layout_is_kept(backend: str, layout: str) -> None:
    case = draw(4, 3, 5, 6, layout=layout)
    y, grad_x, *_ = run(backend, case, torch.ones(1).expand(case.x.shape), groups=2)
    assert y.stride() == grad_x.stride() == case.x.stride()


def test_parameters_of_half_precision() -> None:
    case = draw(2, 3, 4, 4, dtype=torch.bfloat16)
    weight, bias = (t.bfloat16().requires_grad_() for t in case[1:3])
    y = F.batch_norm_relu(case.x, weight, bias, *case[3:])
    expected = F.batch_norm_relu(case.x, weight.float(), bias.float(), *case[3:])
    assert torch.equal(y, expected)
    assert [g.dtype for g in torch.autograd.grad(y.sum(), [weight, bias])] == [torch.bfloat16] * 2


# gradients, custom ops, compilation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", [reference, portable])
def test_gradcheck(module, training: bool) -> None:
    x, weight, bias, *statistics = draw(4, 2, 2, 3).to(torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return module.batch_norm_relu(*tensors, *statistics, groups=2, training=training)

    assert torch.autograd.gradcheck(function, [x, weight, bias])
    assert torch.autograd.gradgradcheck(function, [x, weight, bias])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in draw(4, 3, 4, 5, layout=layout)[:3])
    torch.library.opcheck(batch_norm._normalize, (x, weight, bias, 1e-5, 2))
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    _, *statistics = batch_norm._normalize(x, weight, bias, 1e-5, 2)
    torch.library.opcheck(batch_norm._gradients, (torch.randn(x.shape), x, weight, bias, *statistics, 2))
    torch.library.opcheck(batch_norm._evaluate, (x, weight, bias, *(t[0] for t in statistics)))
    torch.library.opcheck(batch_norm._evaluate, (x, weight, bias, *statistics))


def test_second_derivatives_are_refused() -> None:
    x, weight, bias, *statistics = draw(2, 3, 4, 4).to(torch.float32)
    y = F.batch_norm_relu(x, weight, bias, *statistics)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="set SEMIMOE_BACKEND=portable"):
        gradient.sum().backward()


def test_compiles_without_graph_breaks() -> None:
    case = draw(4, 3, 8, 8, layout="channels-last")
    function = torch.compile(F.batch_norm_relu, fullgraph=True, backend="aot_eager")
    results = []
    for compute in (F.batch_norm_relu, function):
        x, weight, bias, *statistics = case.to(torch.float32)
        y = compute(x, weight, bias, *statistics, groups=2)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, bias]), *statistics])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_a_trace_holds_the_operation() -> None:
    """torch.jit.trace sees no plain function: it would record uninitialized memory."""
    x, weight, bias, *statistics = draw(2, 3, 4, 4)
    evaluate = lambda x: F.batch_norm_relu(x, weight, bias, *statistics, training=False)  # noqa: E731
    traced = torch.jit.trace(evaluate, x, check_trace=False)
    assert torch.equal(traced(x + 1), evaluate(x + 1))


def test_running_statistics_count_their_changes() -> None:
    """Autograd relies on it. Strided statistics are updated too."""
    x, weight, bias, *statistics = draw(2, 3, 4, 4)
    strided = [torch.stack([t, t], 1)[:, 0] for t in statistics]
    for running in (statistics, strided):
        before = [t._version for t in running]
        F.batch_norm_relu(x, weight, bias, *running)
        assert all(t._version > version for t, version in zip(running, before, strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(statistics, strided, strict=True))


def test_no_gradient_from_above() -> None:
    x, weight, bias = (t.requires_grad_() for t in draw(2, 3, 4, 4)[:3])
    NoGradient.apply(F.batch_norm_relu(x, weight, bias, None, None)).sum().backward()
    assert x.grad is None


def test_default_backend_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.choose("batch_norm_relu", "cpu")[0] == "fused"
    monkeypatch.setattr(_native, "why_unavailable", lambda device_type: "it is missing")
    assert ops.choose("batch_norm_relu", "cpu") == ("portable", "it is missing")
