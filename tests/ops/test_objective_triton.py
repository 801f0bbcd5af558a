"""The fused objective against the float64 reference.

Engines: the Triton kernels, on a GPU if there is one, else in Triton's interpreter; and the compiled module on the CPU
with every instruction set.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import ops
from semimoe_fast.ops import _native, _triton, reference
from semimoe_fast.ops import objective as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the fixture `engine` sets cpu for other engines
WEIGHTS = (1.0, -2.0, 0.5)  # of the terms; all different, so that a mix-up of terms fails

# For tests of the custom op, which do not depend on the engine.
ONCE = pytest.mark.parametrize("engine", ["triton" if torch.cuda.is_available() else "plain"], indirect=True)

Predictions = list[tuple[Tensor, ...]]
Targets = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, params=["triton", "plain", "avx2", "avx512"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        if _triton.why_unavailable(DEVICE):
            pytest.skip(_triton.why_unavailable(DEVICE))
        monkeypatch.setenv("SEMIMOE_BACKEND", "fused")
    else:
        if request.param not in _native.module().instruction_sets:
            pytest.skip(f"the CPU kernels for {request.param} do not run here")
        monkeypatch.setattr(request.module, "DEVICE", "cpu")
        monkeypatch.delenv("SEMIMOE_BACKEND", raising=False)
        monkeypatch.setenv("SEMIMOE_SIMD", request.param)
        assert ops.choose("objective_terms", "cpu")[0] == "fused"
    return request.param


def draw(
    sets: int = 2,
    classes: int = 2,
    batch: int = 2,
    height: int = 9,
    width: int = 13,
    dtype: torch.dtype = torch.float32,
) -> tuple[Predictions, Targets]:
    """Random predictions without requires_grad, and targets of which some are out of range."""
    random = torch.Generator().manual_seed(sets + 10 * classes + 100 * batch + 1000 * height + width)

    def normal(channels: int) -> Tensor:
        return (2 * torch.randn(batch, channels, height, width, generator=random)).to(DEVICE, dtype)

    predictions = [(normal(classes), normal(1), normal(2)) for _ in range(sets)]
    mask = torch.randint(-1, classes + 1, (batch, height, width), generator=random)
    boundary = torch.randint(0, 2, (batch, height, width), generator=random, dtype=torch.uint8)
    sdf = 2 * torch.rand(batch, height, width, generator=random) - 1
    return predictions, (mask.to(DEVICE), sdf.to(DEVICE), boundary.to(DEVICE))


def evaluate(joint, predictions: Predictions, targets: Targets) -> tuple[Tensor, list[Tensor]]:
    """The terms, and the gradients of their weighted sum for all predictions."""
    leaves = [[x.detach().requires_grad_() for x in prediction] for prediction in predictions]
    terms = joint(leaves, *targets)
    weights = torch.tensor(WEIGHTS, dtype=terms.dtype, device=terms.device)
    return terms.detach(), list(torch.autograd.grad(terms @ weights, [x for leaf in leaves for x in leaf]))


def check(predictions: Predictions, targets: Targets) -> None:
    """Compare terms and gradients with the float64 reference, and check their dtypes and layouts."""
    terms, gradients = evaluate(F.joint_objective_terms, predictions, targets)
    exact = [tuple(x.double() for x in prediction) for prediction in predictions]
    sdf = targets[1].double().cpu()
    expected_terms, expected = evaluate(
        reference.joint_objective_terms,
        [tuple(x.cpu() for x in p) for p in exact],
        (targets[0].cpu(), sdf, targets[2].cpu()),
    )
    flat = [x for prediction in predictions for x in prediction]
    double = any(x.dtype == torch.float64 for x in flat)
    assert terms.dtype == (torch.float64 if double else torch.float32)
    # float32: probabilities have an error of 1e-7; sums over tiles and sets add little
    tolerance = 1e-12 if double else 2e-6
    torch.testing.assert_close(terms.double().cpu(), expected_terms, rtol=tolerance, atol=tolerance, equal_nan=True)
    # Gradients are rounded to the dtype of their logits; Triton's interpreter truncates bfloat16. Small gradients are
    # differences of larger numbers, so the tolerance is relative to the largest one.
    rounding = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
    for x, gradient, oracle in zip(flat, gradients, expected, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()
        scale = oracle.abs().nan_to_num().max().item() if oracle.numel() else 0
        bound = rounding[x.dtype] * scale + (2**-25 if x.dtype == torch.float16 else 0)  # half a subnormal step
        torch.testing.assert_close(gradient.double().cpu(), oracle, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 31), (127, 1), (16, 32), (31, 33), (32, 32), (33, 64)])
def test_sizes(size: tuple[int, int]) -> None:
    """512 and 1024 pixels are whole tiles."""
    check(*draw(2, 2, 1, *size))


@pytest.mark.parametrize(("sets", "classes", "batch"), [(1, 2, 3), (2, 2, 2), (2, 3, 1), (3, 5, 2)])
def test_sets_classes_and_batches(sets: int, classes: int, batch: int) -> None:
    check(*draw(sets, classes, batch, 15, 17))


def test_many_images_of_many_classes() -> None:
    check(*draw(2, 9, 20, 3, 5))  # 20 x 22 coefficients: more than one step of the finish kernel


def test_finish_kernel_takes_several_steps_over_the_tiles(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine != "triton":
        pytest.skip("only the Triton kernels have tiles")
    from semimoe_fast.kernels import objective

    monkeypatch.setattr(objective, "WARPS", 1)  # tiles of 128 pixels: 9 of them
    monkeypatch.setattr(objective, "FINISH_TILES", 4)
    check(*draw(1, 2, 1, 33, 32))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_predictions_equal_the_reference(shape: tuple[int, int, int]) -> None:
    check(*draw(2, 2, *shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_dtypes(dtype: torch.dtype, classes: int) -> None:
    check(*draw(2, classes, dtype=dtype))


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_every_set_has_its_own_dtype(other: torch.dtype) -> None:
    predictions, targets = draw()
    check([predictions[0], tuple(x.to(other) for x in predictions[1])], targets)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def channel_slice(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]


def channels_last_slice(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, x, x], 1))[:, x.shape[1] : 2 * x.shape[1]]


def crop(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (2, 3, 1, 4))[:, :, 1:-4, 2:-3]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def images_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS = [channels_last, channel_slice, channels_last_slice, crop, transposed, images_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("classes", "size"), [(2, (8, 16)), (3, (9, 13))])  # (8, 16): whole vectors
def test_layouts(layout, classes: int, size: tuple[int, int]) -> None:
    predictions, (mask, sdf, boundary) = draw(2, classes, 2, *size)
    rearranged = [tuple(layout(x) for x in prediction) for prediction in predictions]
    assert all(torch.equal(x, y) for x, y in zip(rearranged[0], predictions[0], strict=True))
    targets = (layout(mask[:, None])[:, 0], layout(sdf[:, None]), layout(boundary[:, None])[:, 0])
    terms, gradients = evaluate(F.joint_objective_terms, rearranged, targets)
    expected_terms, expected = evaluate(F.joint_objective_terms, predictions, (mask, sdf, boundary))
    # the tiles are the same; only the order of the sums within a tile may differ
    torch.testing.assert_close(terms, expected_terms, rtol=1e-6, atol=1e-7)
    for gradient, oracle, x in zip(gradients, expected, (x for p in rearranged for x in p), strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-5, atol=1e-9)
        assert layout in (crop, transposed) or gradient.stride() == torch.empty_like(x).stride()


def test_one_column_of_a_wider_tensor() -> None:
    predictions, targets = draw(1, 2, 2, 9, 5)
    check([tuple(x[..., 2:3] for x in predictions[0])], tuple(x[..., 2:3] for x in targets))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    predictions, (_, sdf, boundary) = draw()
    expected, _ = evaluate(F.joint_objective_terms, predictions, (boundary.long(), sdf, boundary.long()))
    terms, _ = evaluate(F.joint_objective_terms, predictions, (boundary.to(dtype), sdf, boundary.to(dtype)))
    torch.testing.assert_close(terms, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-1, 2, 255, 256, -255, 2**32, -(2**32)])
def test_targets_out_of_range_count_as_no_class(value: int) -> None:
    predictions, (_, sdf, boundary) = draw()
    mask = boundary.long()
    mask[:, :3] = value
    check(predictions, (mask, sdf, boundary))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sdf_of_any_floating_dtype(dtype: torch.dtype) -> None:
    predictions, (mask, sdf, boundary) = draw()
    check(predictions, (mask, sdf[:, None].to(dtype), boundary))


@pytest.mark.parametrize("tensor", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(value: float, tensor: int) -> None:
    predictions, targets = draw()
    predictions[1][tensor][1, 0, 2, 3] = value
    check(predictions, targets)


def test_logits_too_large_for_exp() -> None:
    predictions, targets = draw()
    check([tuple(100 * x for x in prediction) for prediction in predictions], targets)


def test_classes_of_almost_no_probability() -> None:
    """If no pixel has a class, soft dice depends on sums of probabilities as small as its smoothing term, 1e-8."""
    predictions, (mask, sdf, boundary) = draw()
    for prediction in predictions:
        prediction[2][:, 1] = prediction[2][:, 0] - torch.linspace(18, 30, 13, device=DEVICE)
    check(predictions, (mask, sdf, torch.zeros_like(boundary)))


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_losses(case: str, golden) -> None:
    """The published losses and gradients; and two equal sets of predictions give twice the terms of one."""
    archive = {
        k.removeprefix(f"{case}/"): torch.from_numpy(v).to(DEVICE)
        for k, v in golden("losses").items()
        if k.startswith(case)
    }
    names = ("seg_dice", "sdf_mse", "boundary_dice")
    prediction = [archive[key].clone().requires_grad_() for key in ("seg_logits", "sdf_raw", "boundary_logits")]
    targets = [archive[key] for key in ("target", "sdf_target", "boundary_target")]
    terms = F.objective_terms(*prediction, *targets)
    expected = torch.stack([archive[name] for name in names])
    # float32 sums of up to 4,096 terms against the published float32 sums
    torch.testing.assert_close(terms.detach().double(), expected.double(), rtol=1e-5, atol=1e-6)
    terms.sum().backward()
    for tensor, name in zip(prediction, names, strict=True):
        torch.testing.assert_close(tensor.grad, archive[f"{name}_grad"], rtol=1e-4, atol=1e-8)
    joint = F.joint_objective_terms([prediction, prediction], *targets)
    torch.testing.assert_close(joint, 2 * terms, rtol=1e-6, atol=0)  # another order of the same sums


def test_gradients_of_some_predictions_only() -> None:
    predictions, targets = draw()
    _, expected = evaluate(F.joint_objective_terms, predictions, targets)
    predictions[0][2].requires_grad_()
    predictions[1][0].requires_grad_()
    weights = torch.tensor(WEIGHTS, device=DEVICE)
    (F.joint_objective_terms(predictions, *targets) * weights).sum().backward()
    torch.testing.assert_close(predictions[0][2].grad, expected[2], rtol=0, atol=0)
    torch.testing.assert_close(predictions[1][0].grad, expected[3], rtol=0, atol=0)
    assert predictions[0][0].grad is None


def test_two_runs_are_bitwise_equal() -> None:
    predictions, targets = draw(height=40, width=40)
    terms, gradients = evaluate(F.joint_objective_terms, predictions, targets)
    again, gradients_again = evaluate(F.joint_objective_terms, predictions, targets)
    assert torch.equal(terms, again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, gradients_again, strict=True))


def test_autocast_leaves_the_terms_in_float32() -> None:
    predictions, targets = draw()
    expected = F.joint_objective_terms(predictions, *targets)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(F.joint_objective_terms(predictions, *targets), expected, rtol=0, atol=0)


@ONCE
def test_second_derivatives_are_refused() -> None:
    predictions, targets = draw(1)
    for x in predictions[0]:
        x.requires_grad_()
    terms = F.objective_terms(*predictions[0], *targets)
    gradients = torch.autograd.grad(terms.sum(), predictions[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only: for second ones set SEMIMOE_BACKEND=portable"):
        gradients[0].sum().backward()


@ONCE
def test_gradcheck() -> None:
    predictions, targets = draw(2, 3, 2, 2, 3, torch.float64)
    leaves = [x.requires_grad_() for prediction in predictions for x in prediction]
    assert torch.autograd.gradcheck(
        lambda *x: F.joint_objective_terms([x[:3], x[3:]], *targets), leaves, fast_mode=True
    )


@ONCE
@pytest.mark.parametrize("layout", [channel_slice, channels_last, crop])
def test_custom_ops(layout) -> None:
    predictions, (mask, sdf, boundary) = draw(2, 3, 2, 3, 4)
    logits = [layout(x) for prediction in predictions for x in prediction]
    targets = (mask[:, None].to(torch.uint8), sdf[:, None], boundary[:, None])
    torch.library.opcheck(fused._terms, (logits, *targets))
    terms, alpha, beta = fused._terms(logits, *targets)
    torch.library.opcheck(fused._gradients, (torch.ones_like(terms), logits, *targets, alpha, beta))


@ONCE
def test_compiled_without_graph_breaks_equals_eager() -> None:
    predictions, targets = draw(height=4, width=6)
    compiled = torch.compile(F.joint_objective_terms, fullgraph=True, backend="aot_eager")
    terms, gradients = evaluate(compiled, predictions, targets)
    expected_terms, expected = evaluate(F.joint_objective_terms, predictions, targets)
    assert torch.equal(terms, expected_terms)
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


def test_cuda_graph_replays_forward_and_backward() -> None:
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    predictions, targets = draw(height=33, width=31)
    expected = evaluate(F.joint_objective_terms, predictions, targets)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        evaluate(F.joint_objective_terms, predictions, targets)
    torch.cuda.synchronize()
    leaves = [tuple(x.requires_grad_() for x in prediction) for prediction in predictions]
    weights = torch.tensor(WEIGHTS, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = F.joint_objective_terms(leaves, *targets)
        gradients = torch.autograd.grad((terms * weights).sum(), [x for leaf in leaves for x in leaf])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(terms, expected[0])
    for gradient, oracle in zip(gradients, expected[1], strict=True):
        assert torch.equal(gradient, oracle)
