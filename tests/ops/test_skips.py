"""Max pooling beside a skip connection, and concatenations that normalization writes, against PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operations import NoGradient
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.ops import BackendError, _native, _native_batch_norm, _native_pooling, backend, recomputation
from semimoe_fast.ops.skips import concatenate, pool_and_skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("default_backend")


def feature_maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels-last, of few different numbers, so that many are equal."""
    return torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=torch.channels_last)


def calls(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[None]:
    """An element for every later call of a function."""
    seen: list[None] = []
    function = getattr(module, name)

    def spy(*arguments: object) -> object:
        seen.append(None)
        return function(*arguments)

    monkeypatch.setattr(module, name, spy)
    return seen


def pool_by_pytorch(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.max_pool2d(x, 2), x


def pooled_and_gradient(
    pool: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """The pooling of x, and the gradient of x, of which the skip connection's is a part of a concatenation's."""
    x = x.clone().requires_grad_()
    pooled, skip = pool(x)
    joined = torch.cat([skip, others], 1)
    weights = torch.arange(joined.numel()).view(joined.shape).remainder(7)
    ((joined * weights).sum() + (pooled * weights[:, : x.shape[1], ::2, ::2]).sum()).backward()
    return pooled.detach(), x.grad


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (3, 32, 6, 10), (2, 48, 64, 34)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_pooling_and_gradients_are_those_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the first of equal numbers gets the gradient, of NaNs the last."""
    torch.set_num_threads(threads)
    x = feature_maps(*shape, dtype=dtype)
    x[0, :5].masked_fill_(torch.rand(x[0, :5].shape) < 0.4, torch.nan)
    others = feature_maps(shape[0], 16, *shape[2:], dtype=dtype)
    seen = calls(monkeypatch, _native_pooling, "max_pool_backward")
    result = pooled_and_gradient(pool_and_skip, x, others)
    expected = pooled_and_gradient(pool_by_pytorch, x, others)
    assert len(seen) == 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert result[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_a_skip_has_the_strides_of_x(images: int, gradient: bool) -> None:
    """A view that autograd makes of one image has others, with which torch.cat leaves channels-last."""
    x = feature_maps(images, 16, 4, 6).requires_grad_(gradient)
    _, skip = pool_and_skip(x)
    assert skip.stride() == x.stride()
    assert torch.cat([skip, x], 1).is_contiguous(memory_format=torch.channels_last)


def test_pooling_alone_and_skip_alone() -> None:
    x = feature_maps(2, 16, 4, 4).requires_grad_()
    pooled, _ = pool_and_skip(x)
    (expected,) = torch.autograd.grad(torch.nn.functional.max_pool2d(x, 2).sum(), x)
    assert torch.equal(torch.autograd.grad(pooled.sum(), x)[0], expected)
    _, skip = pool_and_skip(x)
    assert torch.equal(torch.autograd.grad(skip.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize(
    "x",
    [
        feature_maps(2, 8, 4, 4),
        feature_maps(2, 16, 5, 4),
        feature_maps(2, 16, 4, 4).contiguous(),
        feature_maps(2, 16, 4, 4).double(),
        feature_maps(0, 16, 4, 4),
    ],
    ids=["8 channels", "odd height", "channels first", "float64", "no images"],
)
def test_other_feature_maps_are_pooled_by_pytorch(x: Tensor) -> None:
    assert not _native_pooling.takes(x)
    pooled, skip = pool_and_skip(x)
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(x, 2))
    assert skip is x


def test_the_portable_backend_uses_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, _native_pooling, "max_pool")
    with backend("portable"):
        pool_and_skip(feature_maps(2, 16, 4, 4))
    assert not seen


def test_the_fused_backend_needs_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_load", lambda: (None, "no module"))
    pool_and_skip(feature_maps(2, 16, 4, 4))
    with backend("fused"), pytest.raises(BackendError, match="no module; choose another backend"):
        pool_and_skip(feature_maps(2, 16, 4, 4))


def test_pooling_bears_hooks_that_save_other_strides() -> None:
    x, others = torch.randn(2, 16, 6, 10).contiguous(memory_format=torch.channels_last), feature_maps(2, 16, 6, 10)
    expected = pooled_and_gradient(pool_and_skip, x, others)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.contiguous(), lambda tensor: tensor):
        result = pooled_and_gradient(pool_and_skip, x, others)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_second_derivatives_of_pooling() -> None:
    """Those of sum(pooled^2) + sum(skip^3): 2 at the largest values, and 6 x."""
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()

    def derivative(pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        pooled, skip = pool(x)
        (first,) = torch.autograd.grad(pooled.square().sum() + skip.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    torch.testing.assert_close(derivative(pool_and_skip), derivative(pool_by_pytorch))


def test_transformed_pooling() -> None:
    """Under torch.func and in forward mode, PyTorch pools."""
    x, direction = feature_maps(2, 16, 4, 4), feature_maps(2, 16, 4, 4)
    for transform in (
        lambda pool: torch.func.grad(lambda x: pool(x)[0].square().sum())(x),
        lambda pool: torch.func.jvp(lambda x: pool(x)[0], (x,), (direction,))[1],
        lambda pool: forward_mode(pool, x, direction),
    ):
        assert torch.equal(transform(pool_and_skip), transform(pool_by_pytorch))


def forward_mode(pool: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, direction: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(pool(torch.autograd.forward_ad.make_dual(x, direction))[0]).tangent


def test_the_skip_is_computed_again() -> None:
    """Under `recompute`, from what the normalization computes again."""
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16)
    with recomputation.recompute():
        y = F.batch_norm_relu(
            torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last), weight, bias, None, None
        )
        _, skip = pool_and_skip(y)
        assert isinstance(recomputation.pack(skip, recomputation._recipes.get()), recomputation.Recipe)


def joined(x: Tensor, skip: Tensor, apart: bool) -> list[Tensor]:
    """The concatenation, running statistics and gradients; `apart`: normalized, and then concatenated."""
    tensors = [x, skip, torch.linspace(0.5, 1.5, x.shape[1]), torch.linspace(-1, 1, x.shape[1])]
    x, skip, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors)
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    y = F.batch_norm_relu(x, weight, bias, *running, groups=2, skip=None if apart else skip)
    result = concatenate(skip, y) if apart else y
    weights = torch.arange(result.numel()).view(result.shape).remainder(11)
    (result * weights).sum().backward()
    return [result.detach(), *running, x.grad, weight.grad, bias.grad, skip.grad]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "skips", "size"), [(16, 16, (2, 2)), (64, 16, (7, 5)), (32, 48, (61, 37)), (176, 16, (9, 3))], ids=str
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_joined_result_equals_a_concatenation(
    channels: int, skips: int, size: tuple[int, int], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, gradients too, without a concatenation. The pieces and rests of both are the same."""
    torch.set_num_threads(threads)
    x = torch.randn(4, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    skip = feature_maps(4, skips, *size, dtype=dtype)
    expected = joined(x, skip, apart=True)
    seen = calls(monkeypatch, _native_batch_norm, "joined_fwd")
    result = joined(x, skip, apart=False)
    assert len(seen) == 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert result[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "skip"),
    [
        (torch.randn(4, 8, 6, 6), feature_maps(4, 16, 6, 6)),
        (torch.randn(4, 16, 6, 6), feature_maps(4, 3, 6, 6)),
        (torch.randn(4, 16, 6, 6), feature_maps(4, 16, 6, 6).contiguous()),
    ],
    ids=["8 channels", "3 skips", "channels first"],
)
@pytest.mark.parametrize("name", ["reference", "portable", "fused"])
def test_other_feature_maps_are_concatenated(x: Tensor, skip: Tensor, name: str) -> None:
    with backend(name):
        result, expected = joined(x, skip, apart=False), joined(x, skip, apart=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("skips", [0, 16])
def test_gradients_of_a_joined_result_that_are_none(skips: int) -> None:
    """Of a skip connection without channels, and of a result whose gradient nothing needs."""

    x, skip = feature_maps(2, 16, 4, 4).requires_grad_(), feature_maps(2, skips, 4, 4).requires_grad_()
    result = F.batch_norm_relu(x, torch.ones(16), torch.zeros(16), None, None, skip=skip)
    result.square().sum().backward(retain_graph=True)
    assert skip.grad.shape == skip.shape
    before = x.grad.clone()
    NoGradient.apply(result).sum().backward()
    assert torch.equal(x.grad, before)


def test_the_module_joins_on_the_cpu_alone() -> None:
    x = feature_maps(2, 16, 4, 4)
    assert _native_batch_norm.joins(x, x)
    assert not _native_batch_norm.joins(x.to("meta"), x.to("meta"))


def test_evaluation_joins_too() -> None:
    x, skip, running = torch.randn(2, 16, 4, 4), feature_maps(2, 16, 4, 4), (torch.zeros(16), torch.ones(16))
    weight, bias = torch.ones(16), torch.zeros(16)
    result = F.batch_norm_relu(x, weight, bias, *running, training=False, skip=skip)
    assert torch.equal(result[:, :16], skip)
    torch.testing.assert_close(result[:, 16:], x.relu() * (1 + 1e-5) ** -0.5)


def test_the_skip_has_the_size_of_x() -> None:
    x, vector = torch.randn(2, 16, 4, 4), torch.ones(16)
    with pytest.raises(ValueError, match=r"skip is \(2, 16, 4, 5\) and x \(2, 16, 4, 4\)"):
        F.batch_norm_relu(x, vector, vector, None, None, skip=torch.zeros(2, 16, 4, 5))


def test_the_module_refuses_what_it_cannot_address() -> None:
    x = feature_maps(2, 16, 4, 4)
    vectors = torch.ones(16), torch.zeros(16)
    with pytest.raises(ValueError, match="in the layout of x"):
        _native_batch_norm.batch_norm_relu_fwd(x, *vectors, 1e-5, 1, torch.zeros(2, 24, 4, 4)[:, :16])
