"""The Triton kernels of batch normalization and ReLU against float64 formulas: on a GPU if there is one, else in the
interpreter.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import semimoe_fast
from semimoe_fast import functional as F
from semimoe_fast.ops import _triton

pytest.importorskip("triton")

from semimoe_fast.kernels import _tiling, batch_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(bool(_triton.why_unavailable(DEVICE)), reason=str(_triton.why_unavailable(DEVICE)))
EPS = 1e-5
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
FLOAT32 = 1e-6  # 16 roundings: about four in each result, and those of sums, which are shorter than log2 of their terms
# Triton's interpreter truncates bfloat16 instead of rounding it.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 0.0}  # half a step

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 float32 values and chunks of up to 4 tiles; a step of the merge takes two chunks."""
    monkeypatch.setattr(_tiling, "TILE_BYTES", 128)
    monkeypatch.setattr(_tiling, "ROW_BYTES", 16)
    monkeypatch.setattr(_tiling, "PROGRAMS", 1)
    monkeypatch.setattr(_tiling, "MOST_TILES", 4)
    monkeypatch.setattr(batch_norm, "MERGE_CHUNKS", 2)


def draw(*shape: int, layout: str = "NCHW", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=random).to(DEVICE, dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x


def per_channel(x: Tensor) -> Tensor:
    """x (groups, C) or (C,) as a factor of (groups, B / groups, C, H, W)."""
    return x.double().cpu().unflatten(-1, (1, -1, 1, 1))


def close(result: Tensor, expected: Tensor, error: float, scale: Tensor | float) -> None:
    """Compare with float64; the error is relative to `scale`, and results of 16 bits are rounded."""
    bound = error * float(scale) + SUBNORMAL[result.dtype]
    assert result.isfinite().all()
    torch.testing.assert_close(
        result.double().cpu(), expected.reshape(result.shape), rtol=ROUNDING[result.dtype], atol=bound
    )


def check(x: Tensor, groups: int = 1, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Compare y, statistics and gradients with float64 formulas, and check their dtypes and layouts."""
    channels = x.shape[1]
    weight = draw(channels, seed=1) if weight is None else weight
    bias = draw(channels, seed=2) if bias is None else bias
    grad_output = torch.empty_like(x).copy_(draw(*x.shape, seed=3))
    y, mean, inverse_deviation = batch_norm.batch_norm_relu_fwd(x, weight, bias, EPS, groups)
    gradients = batch_norm.batch_norm_relu_bwd(grad_output, x, weight, bias, mean, inverse_deviation, groups)
    for result in (y, gradients[0]):
        assert (result.dtype, result.shape, result.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    for result in (mean, inverse_deviation, *gradients[1:]):
        assert result.dtype == torch.float32
    assert mean.shape == inverse_deviation.shape == (groups, channels)

    exact = x.double().cpu().unflatten(0, (groups, -1))
    pixels = exact[0].numel() // channels
    w, b = per_channel(weight), per_channel(bias)
    center = exact.mean((1, 3, 4), keepdim=True)
    inverse = (exact.var((1, 3, 4), correction=0, keepdim=True) + EPS).rsqrt()
    xhat = (exact - center) * inverse
    z = w * xhat + b
    # The mean has 24 bits, so errors of xhat are relative to mean / deviation.
    error = FLOAT32 * (1 + (center * inverse).abs().max().item())
    close(mean, center, FLOAT32, (center.abs() + 1 / inverse).max())
    exact_inverse = inverse.reshape(groups, channels)
    torch.testing.assert_close(inverse_deviation.double().cpu(), exact_inverse, rtol=FLOAT32, atol=0)
    close(y, z.relu(), error, (w * xhat).abs().max() + b.abs().max())

    dz = grad_output.double().cpu().unflatten(0, (groups, -1)) * (y.cpu() > 0).unflatten(0, (groups, -1))
    sums, products = (term.sum((1, 3, 4), keepdim=True) for term in (dz, dz * xhat))
    grad_x = w * inverse * (dz - (sums + xhat * products) / pixels)
    terms = dz.abs() * (1 + xhat.abs())
    largest = terms.sum((0, 1, 3, 4)).max()
    scale = (w * inverse).abs().max() * (1 + xhat.abs().max()) * terms.max()
    close(gradients[0], grad_x, error, scale)
    close(gradients[1], products.sum(0), error, largest)
    close(gradients[2], sums.sum(0), error, largest)


@every_layout
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 5, 7, 9), 1), ((6, 5, 7, 9), 3), ((6, 3, 1, 1), 2), ((4, 1, 5, 3), 2), ((2, 70, 2, 2), 1)],
)
def test_shapes_and_groups(shape: tuple[int, ...], groups: int, layout: str) -> None:
    check(draw(*shape, layout=layout), groups)


@every_layout
def test_several_tiles(layout: str) -> None:
    check(draw(2, 2, 65, 33, layout=layout), 2)


@every_layout
@pytest.mark.parametrize("groups", [1, 2])
def test_several_tiles_per_chunk_and_steps_per_merge(groups: int, layout: str, small_tiles: None) -> None:
    """The last tile of an image and the last chunk of a group are smaller than others."""
    x = draw(4, 2, 13, 11, layout=layout)
    tiling = _tiling.tiling_of(x, groups)
    assert tiling.TILES.value == 4
    assert tiling.chunks > 2
    check(x, groups)


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, parameters: torch.dtype, layout: str) -> None:
    weight, bias = (draw(6, dtype=parameters, seed=seed) for seed in (1, 2))
    check(draw(4, 6, 5, 8, layout=layout, dtype=dtype), 2, weight, bias)


@every_layout
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_large_means(offset: float, layout: str, small_tiles: None) -> None:
    """With E[x^2] - E[x]^2 in float32, the variance would be lost."""
    check(draw(2, 2, 13, 11, layout=layout) + offset)


@every_layout
def test_first_tile_unlike_the_others(layout: str, small_tiles: None) -> None:
    """The sums of a chunk are relative to the mean of its first tile."""
    x = draw(1, 2, 8, 16, layout=layout) + 1e4
    x[:, :, 0] = -1e4
    check(x)


@every_layout
def test_constant_images(layout: str) -> None:
    x = torch.full((2, 3, 9, 7), 0.1, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    check(x, 2)


@every_layout
def test_two_runs_are_bitwise_equal(layout: str, small_tiles: None) -> None:
    x, weight, bias = draw(2, 2, 9, 11, layout=layout), draw(2, seed=1), draw(2, seed=2)

    def step() -> tuple[Tensor, ...]:
        y, *statistics = batch_norm.batch_norm_relu_fwd(x, weight, bias, EPS, 2)
        return y, *statistics, *batch_norm.batch_norm_relu_bwd(y, x, weight, bias, *statistics, 2)

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation(dtype: torch.dtype, layout: str) -> None:
    x = draw(3, 5, 7, 9, layout=layout, dtype=dtype)
    weight, bias, mean = (draw(5, seed=seed) for seed in (1, 2, 3))
    inverse_deviation = draw(5, seed=4).abs()
    y = batch_norm.batch_norm_relu_eval(x, weight, bias, mean, inverse_deviation)
    w, b, m, i = (per_channel(parameter) for parameter in (weight, bias, mean, inverse_deviation))
    z = w * (x.double().cpu() - m) * i + b
    assert y.stride() == x.stride()
    close(y, z.relu(), FLOAT32, z.abs().max())


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_repeats_training_bit_for_bit(dtype: torch.dtype, layout: str, small_tiles: None) -> None:
    x, weight, bias = draw(4, 5, 7, 9, layout=layout, dtype=dtype), draw(5, seed=1), draw(5, seed=2)
    for groups in (1, 2):
        y, *statistics = batch_norm.batch_norm_relu_fwd(x, weight, bias, EPS, groups)
        assert torch.equal(batch_norm.batch_norm_relu_eval(x, weight, bias, *statistics), y)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of NumPy in the interpreter: inf - inf
@every_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_values_stay_in_their_channel_and_group(value: float, layout: str) -> None:
    x, weight, bias = draw(4, 3, 5, 6, layout=layout), draw(3, seed=1), draw(3, seed=2)
    x[3, 1, 2, 3] = value
    y, mean, inverse_deviation = batch_norm.batch_norm_relu_fwd(x, weight, bias, EPS, 2)
    grad_x, *_ = batch_norm.batch_norm_relu_bwd(y, x, weight, bias, mean, inverse_deviation, 2)
    expected = torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)
    expected[2:, 1] = True
    for result in (y, grad_x):
        assert torch.equal(result.isnan().any(3).any(2), expected)
    assert torch.equal(mean.isfinite() & inverse_deviation.isfinite(), ~expected[::2])
    assert y[3, 1, 2, 3].isnan()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_evaluation_of_no_pixels(shape: tuple[int, ...]) -> None:
    x, weight, bias = draw(*shape), draw(3, seed=1), draw(3, seed=2)
    assert batch_norm.batch_norm_relu_eval(x, weight, bias, bias, bias).shape == x.shape


def test_the_public_operation_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, its gradients and running statistics, and evaluation, on tensors that the kernels take as copies."""
    monkeypatch.setenv("SEMIMOE_BACKEND", "fused")
    kernels = importlib.import_module("semimoe_fast.ops.batch_norm")._kernels
    assert kernels(DEVICE) is batch_norm
    transposed = draw(4, 5, 7, 6).mT
    x, weight, bias = (t.requires_grad_() for t in (transposed, draw(5), draw(5, seed=1)))
    grad_output = draw(4, 5, 6, 7, seed=2).contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("fused", "portable"):
        running = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
        with semimoe_fast.backend(backend):
            y = F.batch_norm_relu(x, weight, bias, *running, groups=2)
            with torch.no_grad():
                evaluated = F.batch_norm_relu(x, weight, bias, *running, training=False)
        results.append([y, *torch.autograd.grad(y, [x, weight, bias], grad_output), *running, evaluated])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
        assert result.stride() == expected.stride()
