"""The folding of upsampling weights: every backend that runs here against upsampling followed by a convolution in
float64. The Triton kernels run on a GPU if there is one, else in the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operations import exact
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, interpolate

import semimoe_fast
from semimoe_fast import functional as F
from semimoe_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBSTACLE = ops.why_not_fused("fold_upsampling", DEVICE)
FUSED = pytest.param("fused", marks=pytest.mark.skipif(bool(OBSTACLE), reason=str(OBSTACLE)))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(1, 1), (3, 5), (8, 16), (40, 33), (31, 65)]  # (O, C), below and above a tile of 32 x 32 pairs
# Rounding of results; Triton's interpreter truncates bfloat16.
ROUNDING = {torch.float64: 0, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}

every_backend = pytest.mark.parametrize("backend", ["reference", "portable", FUSED])
optimized_backends = pytest.mark.parametrize("backend", ["portable", FUSED])
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def draw(
    shapes: Sequence[tuple[int, int]] = SHAPES, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> list[Tensor]:
    """Random weights (O, C, 3, 3)."""
    random = torch.Generator().manual_seed(len(shapes))
    weights = [torch.randn(*shape, 3, 3, generator=random).to(DEVICE, dtype) for shape in shapes]
    return [weight.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for weight in weights]


def draw_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) for x in tensors]


@every_backend
@every_layout
@pytest.mark.parametrize(
    ("dtype", "result"), [*((dtype, None) for dtype in ROUNDING), (torch.float32, torch.bfloat16)], ids=str
)
def test_values_and_gradients(backend: str, dtype: torch.dtype, result: torch.dtype | None, layout: str) -> None:
    """Up to four products of 0 or 1 are summed in float32: three roundings, and that of the result."""
    weights = draw(dtype=dtype, layout=layout)
    leaves = exact(weights)
    with semimoe_fast.backend(backend):
        kernels = F.fold_upsampling(weights, result)
    grad_kernels = draw_like(kernels)
    gradients = torch.autograd.grad(kernels, weights, grad_kernels)
    expected = ops.reference.fold_upsampling(leaves)
    oracles = torch.autograd.grad(expected, leaves, exact(grad_kernels))
    cases = [(kernels, expected, result or dtype), (gradients, oracles, dtype)]
    for tensors, references, expected_dtype in cases:
        precision = 3 * ROUNDING[torch.promote_types(dtype, torch.float32)] + ROUNDING[expected_dtype] + 1e-15
        for tensor, oracle in zip(tensors, references, strict=True):
            assert (tensor.dtype, tensor.shape) == (expected_dtype, oracle.shape)
            bound = precision * max(1.0, oracle.abs().max().item())
            torch.testing.assert_close(tensor.detach().cpu().double(), oracle.detach(), rtol=0, atol=bound)


@every_backend
def test_equals_upsampling_then_convolution(backend: str) -> None:
    """Results and all gradients, in float64; the shapes of images are 1 and primes."""
    weights = [weight.double().detach().requires_grad_() for weight in draw([(2, 3), (4, 3)])]
    x = torch.randn(2, 3, 1, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    with semimoe_fast.backend(backend):
        kernels = F.fold_upsampling(weights)
    results = [conv_transpose2d(x, kernel, stride=2, padding=1) for kernel in kernels]
    expected = [conv2d(interpolate(x, scale_factor=2), weight, padding=1) for weight in weights]
    torch.testing.assert_close(results, expected)
    grad_outputs = draw_like(results)
    gradients, oracles = (torch.autograd.grad(y, [x, *weights], grad_outputs) for y in (results, expected))
    torch.testing.assert_close(gradients, oracles)


@optimized_backends
@every_layout
def test_layouts(backend: str, layout: str) -> None:
    """Kernels lie as convolutions take them, gradients as the weights."""
    weights = draw([(4, 6), (40, 33)], layout=layout)
    with semimoe_fast.backend(backend):
        kernels = F.fold_upsampling(weights)
    for kernel in kernels:
        if backend == "fused" or DEVICE == "cuda":
            assert kernel.is_contiguous(memory_format=torch.channels_last)
        else:
            assert kernel.permute(2, 3, 0, 1).is_contiguous()
    gradients = torch.autograd.grad(kernels, weights, [torch.ones_like(kernel) for kernel in kernels])
    assert [gradient.stride() for gradient in gradients] == [weight.stride() for weight in weights]


@optimized_backends
def test_any_layout_gives_the_same_numbers(backend: str) -> None:
    """Weights of mixed layouts, a slice, and gradients that are neither contiguous nor channels-last."""
    first, second = draw([(5, 7), (6, 4)])
    others = [
        first.detach().contiguous(memory_format=torch.channels_last),
        torch.cat([second.detach()] * 2, 1)[:, 4:],
    ]
    results = []
    for weights in ([first, second], [other.requires_grad_() for other in others]):
        with semimoe_fast.backend(backend):
            kernels = F.fold_upsampling(weights)
        grad_kernels = [grad.mT.contiguous().mT for grad in draw_like(kernels)]
        results.append([*kernels, *torch.autograd.grad(kernels, weights, grad_kernels)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@optimized_backends
def test_some_weights_without_gradients(backend: str) -> None:
    first, second = draw([(2, 3), (4, 5)])
    second.requires_grad_(False)
    with semimoe_fast.backend(backend):
        kernels = F.fold_upsampling([first, second])
    sum(kernel.sum() for kernel in kernels).backward()
    assert first.grad.tolist() == torch.full((2, 3, 3, 3), 4.0).tolist()  # each tap is in four sums
    assert second.grad is None


def test_custom_ops_pass_opcheck() -> None:
    weights = draw([(3, 5), (2, 1)])
    torch.library.opcheck(torch.ops.semimoe_fast.fold_upsampling.default, (weights, torch.float32, False))
    grad_kernels = [grad.requires_grad_() for grad in draw_like(F.fold_upsampling(weights))]
    weights = [weight.detach() for weight in weights]
    torch.library.opcheck(torch.ops.semimoe_fast.fold_upsampling_gradients.default, (grad_kernels, weights, False))


@pytest.mark.skipif(bool(OBSTACLE), reason=str(OBSTACLE))
@every_layout
def test_fused_kernels_have_the_strides_of_the_fake_ones(layout: str) -> None:
    weights = [weight.detach() for weight in draw([(3, 5), (1, 2), (2, 1)], layout=layout)]
    checks = ("test_schema", "test_faketensor")
    ours = torch.ops.semimoe_fast
    torch.library.opcheck(ours.fold_upsampling.default, (weights, torch.bfloat16, True), test_utils=checks)
    grad_kernels = draw_like(F.fold_upsampling(weights))
    torch.library.opcheck(ours.fold_upsampling_gradients.default, (grad_kernels, weights, True), test_utils=checks)


@optimized_backends
def test_compiles_without_graph_breaks(backend: str) -> None:
    def step(weights: list[Tensor]) -> Tensor:
        return sum(kernel.square().sum() for kernel in F.fold_upsampling(weights, torch.bfloat16))

    weights = draw([(3, 5), (2, 4)])
    torch.compiler.reset()  # a trace keeps its backend
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with semimoe_fast.backend(backend):
        results = [torch.autograd.grad(function(weights), weights) for function in (step, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_second_derivatives(backend: str) -> None:
    weights = [weight.double().detach().requires_grad_() for weight in draw([(2, 1), (1, 2)])]

    def folded(*weights: Tensor) -> tuple[Tensor, ...]:
        with semimoe_fast.backend(backend):
            return tuple(F.fold_upsampling(weights))

    assert torch.autograd.gradcheck(folded, weights)
    assert torch.autograd.gradgradcheck(folded, weights)


@optimized_backends
def test_second_derivatives_of_kernels_in_bfloat16(backend: str) -> None:
    """The gradient of the gradient has the dtype of the kernels."""
    weights = draw([(2, 3)])
    with semimoe_fast.backend(backend):
        (kernel,) = F.fold_upsampling(weights, torch.bfloat16)
    grad_kernel = torch.ones_like(kernel, requires_grad=True)
    gradients = torch.autograd.grad([kernel], weights, [grad_kernel], create_graph=True)
    (second,) = torch.autograd.grad(gradients, [grad_kernel], [weight.detach() for weight in weights])
    assert torch.equal(second, kernel)


def test_no_weights() -> None:
    assert F.fold_upsampling([]) == F.fold_upsampling((), torch.bfloat16) == []


@pytest.mark.parametrize(
    ("weights", "dtype", "error", "message"),
    [
        ([torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 5, 5)], None, ValueError, r"tensors \(O, C, 3, 3\), got \[\(2"),
        (torch.zeros(2, 2, 3, 3), None, ValueError, r"weights is a sequence .*, got \(2, 2, 3, 3\)"),
        ([torch.zeros(2, 0, 3, 3)], None, ValueError, r"weights have outputs and channels, got \[\(2, 0, 3, 3\)\]"),
        ([torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3).half()], None, TypeError, "weights have one dtype"),
        ([torch.zeros(1, 1, 3, 3).int()], None, TypeError, "floating-point numbers are needed"),
        ([torch.zeros(1, 1, 3, 3)], torch.int32, TypeError, "dtype is torch.int32: give a floating-point type"),
    ],
)
def test_bad_arguments(weights: list[Tensor], dtype: torch.dtype | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        F.fold_upsampling(weights, dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["reference", "portable"])
def test_nan_stays_in_the_sums_of_its_tap(name: str) -> None:
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 0, 0] = torch.nan
    with semimoe_fast.backend(name):
        (kernel,) = F.fold_upsampling([weight])
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 2:] = True
    assert torch.equal(kernel[0, 0].isnan(), expected)
