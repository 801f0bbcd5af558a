"""Model: shapes for any number of experts, tasks and classes and any width; initialization; layouts; hooks; compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast import model as model_module
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, ExpertUNet, MultiGating, SemiMoE, UpsamplingConv2d
from semimoe_fast.objective import objective


@pytest.mark.parametrize(
    ("tasks", "classes", "width", "channels", "size"),
    [
        (("mask", "sdf", "boundary"), 2, 4, 3, (32, 48)),
        (("mask", "sdf", "boundary"), 5, 3, 1, (17, 31)),
        (("mask", "mask", "sdf", "boundary"), 2, 2, 4, (16, 16)),
        (("sdf", "mask"), 3, 2, 3, (1, 5)),
        (("boundary",), 2, 2, 3, (33, 16)),
    ],
)
def test_output_shapes(tasks, classes, width, channels, size) -> None:
    model = SemiMoE(channels, classes, width, tasks).eval()
    output = model(torch.randn(2, channels, *size))
    rows = {"mask": classes, "sdf": 1, "boundary": 2}
    for task, count in rows.items():
        prediction = getattr(output, task)
        assert prediction is None if task not in tasks else prediction.shape == (2, count, *size)
    assert [own.shape for own in output.own] == [(2, rows[task], *size) for task in tasks]
    assert output.gate_weights.shape == (2, len(set(tasks)), len(tasks))
    torch.testing.assert_close(output.gate_weights.sum(2), torch.ones(2, len(set(tasks))))


def test_border_is_repeated_and_results_are_cropped() -> None:
    expert = ExpertUNet(3, 2, 2).eval()
    image = torch.randn(1, 3, 20, 37)
    padded = torch.nn.functional.pad(image, (0, 11, 0, 12), mode="replicate")
    for result, whole in zip(expert(image), expert(padded), strict=True):
        torch.testing.assert_close(result, whole[..., :20, :37])


def test_initialization() -> None:
    torch.manual_seed(0)
    expert = ExpertUNet(3, 2, 16)
    convolution, norm = expert.decoder[0][0], expert.decoder[0][1]
    fan_in = convolution.weight[0].numel()
    # the sample std of 128 x 256 x 9 and of 128 random numbers deviates by about 0.1 % and 6 %
    assert convolution.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    gating = MultiGating(16, 3)
    assert gating.gates[0].linear1.weight.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.1)
    biases = [p for m in (expert, gating) for name, p in m.named_parameters() if name.endswith("bias")]
    assert biases
    assert all((bias == 0).all() for bias in biases)


def test_forward_hooks_fire_in_training_and_evaluation() -> None:
    """Hooks on an expert, its head and the gating fire once per call and see the module's output."""
    model, adaptive = SemiMoE(width=1), AdaptiveMultiObjectiveLoss()
    images, mask = torch.randn(2, 3, 16, 16), torch.randint(0, 2, (2, 16, 16))
    expected = model.eval()(images)
    shapes: dict[str, list] = {"expert": [], "head": [], "gating": []}

    def record(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: shapes[name].append([x.shape for x in output]))

    record("expert", model.experts[0])
    record("gating", model.gating)
    for hooked, unhooked in zip(model(images)[:3], expected[:3], strict=True):
        torch.testing.assert_close(hooked, unhooked)
    model.experts[0].head.register_forward_hook(lambda module, inputs, output: shapes["head"].append(output.shape))
    assert shapes == {
        "expert": [[(2, 1, 16, 16), (2, 2, 16, 16)]],
        "head": [],
        "gating": [[(2, 2, 16, 16), (2, 1, 16, 16), (2, 2, 16, 16), (2, 3, 3)]],
    }
    objective(model.train(), adaptive, images, (mask, *F.distance_targets(mask)), images, 0.5).total.backward()
    assert {name: len(calls) for name, calls in shapes.items()} == {"expert": 2, "head": 1, "gating": 2}


def test_channels_last_changes_the_layout_only() -> None:
    model = SemiMoE(width=2).eval()
    image = torch.randn(1, 3, 32, 32)
    expected = model(image).mask
    model = model.to(memory_format=torch.channels_last)
    result = model(image.contiguous(memory_format=torch.channels_last)).mask
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)  # float32, other order of summation


def test_gates_follow_their_formula() -> None:
    gating = MultiGating(2, 3, dropout=0.0)
    for parameter in gating.gates.parameters():
        torch.nn.init.normal_(parameter)
    means = torch.randn(4, 3, 2)
    x = means.flatten(1)
    for gate, weights in zip(gating.gates, gating.gate_weights(means).unbind(1), strict=True):
        hidden = torch.relu(x @ gate.linear1.weight.T + gate.linear1.bias)
        attention = torch.softmax(hidden @ gate.attention.weight.T + gate.attention.bias, 1)
        expected = torch.softmax((hidden * attention) @ gate.linear2.weight.T + gate.linear2.bias, 1)
        torch.testing.assert_close(weights, expected)


def test_dropout_is_active_in_training_only() -> None:
    gating, means = MultiGating(8, 3, dropout=0.5), torch.randn(2, 3, 8)
    assert not torch.equal(gating.gate_weights(means), gating.gate_weights(means))
    gating.eval()
    assert torch.equal(gating.gate_weights(means), gating.gate_weights(means))


def test_pseudo_labels_come_from_the_gated_predictions() -> None:
    gating = MultiGating(4, 3).eval()
    features = [torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(3)]
    mask, sdf, boundary, _ = gating(features)
    labels = gating.pseudo_labels(*gating.projections(features)[:2])
    torch.testing.assert_close(labels[0], mask.argmax(1).to(torch.uint8))
    torch.testing.assert_close(labels[1], sdf.detach().tanh())
    torch.testing.assert_close(labels[2], boundary.argmax(1).to(torch.uint8))
    assert not any(label.requires_grad for label in labels)


@pytest.mark.parametrize("terms", [1, 3, 4])
def test_adaptive_loss_module(terms: int) -> None:
    adaptive = AdaptiveMultiObjectiveLoss([1.0] * terms, regularizer=0.4, initial=1.0)
    total = adaptive(torch.ones(terms))
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(total, terms * (1 / e + 0.4 * e))
    total.backward()
    assert adaptive.log_vars.grad.shape == (terms,)


def test_training_objective_compiles_without_graph_breaks() -> None:
    """A whole step with gradients: experts, gates, pseudo-labels and losses."""
    torch.manual_seed(0)
    model, adaptive = SemiMoE(width=1), AdaptiveMultiObjectiveLoss()
    model.gating.dropout.p = 0.0
    labeled, unlabeled = torch.randn(2, 2, 3, 32, 32)
    mask = torch.randint(0, 2, (2, 32, 32), dtype=torch.uint8)

    def total(model: SemiMoE) -> torch.Tensor:
        targets = (mask, *F.distance_targets(mask))
        return objective(model, adaptive, labeled, targets, unlabeled, 0.5).total

    expected = total(model)
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(model)
    torch.testing.assert_close(compiled, expected)
    for ours, theirs in zip(torch.autograd.grad(compiled, [*model.parameters()]), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # float32 sums fused in another order


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'contour': choose from mask, sdf, boundary"):
        SemiMoE(expert_tasks=("mask", "contour"))


def test_a_mask_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 1: give at least 2"):
        SemiMoE(num_classes=1)


@pytest.mark.slow
def test_model_compiles_without_graph_breaks() -> None:
    model = SemiMoE(width=2, expert_tasks=("mask",)).eval()
    image = torch.randn(1, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image).mask, model(image).mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
def test_upsampling_convolution_equals_upsampling_then_convolution(size: tuple[int, int]) -> None:
    layer = UpsamplingConv2d(3, 2, 3, padding=1).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1
    )
    grad_output = torch.randn_like(expected)
    assert torch.equal(layer(x), expected)
    result = layer(x, *F.fold_upsampling([layer.weight]))
    torch.testing.assert_close(result, expected)
    inputs = (x, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(result, inputs, grad_output),
        torch.autograd.grad(expected, inputs, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_upsampling_is_folded_where_that_is_predicted_to_be_faster() -> None:
    assert model_module.folds_upsampling("cpu", 1)
    assert [model_module.folds_upsampling("cuda", 4 * side * side) for side in (4, 7, 8, 64)] == [
        False,
        False,
        True,
        True,
    ]


def test_levels_computed_plainly_give_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients. Two images, padded to 32 x 48 pixels, have 12 pixels in the deepest level and 48 above."""
    model, images = SemiMoE(width=2).double(), torch.randn(2, 3, 30, 48, dtype=torch.float64)
    results = []
    for least in (0, 13):
        monkeypatch.setattr(model_module, "folds_upsampling", lambda device, pixels, least=least: pixels >= least)
        kernels = model_module.upsampling_kernels(model.experts, images)
        assert [[kernel is None for kernel in own] for own in kernels] == 3 * [[least > 0, False, False, False]]
        _, _, own = model.run_experts(images)
        gradients = torch.autograd.grad(sum(x.square().mean() for x in own), list(model.experts.parameters()))
        results.append([*own, *gradients])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-12)


def test_all_upsampling_weights_are_folded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast they are folded into its dtype, but float64 keeps its own."""
    calls = []
    fold = F.fold_upsampling

    def spy(weights: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        kernels = fold(weights, dtype)
        calls.append((len(kernels), kernels[0].dtype))
        return kernels

    monkeypatch.setattr(F, "fold_upsampling", spy)
    model, images = SemiMoE(width=1).eval(), torch.randn(1, 3, 16, 16)
    model(images)
    model.experts[0](images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        model.double().run_experts(images.double())
    assert calls == [(12, torch.float32), (4, torch.float32), (12, torch.bfloat16), (12, torch.float64)]


def test_global_hooks_see_the_experts() -> None:
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        SemiMoE(width=1).eval()(torch.randn(1, 3, 16, 16))
    finally:
        handle.remove()
    assert called.count(ExpertUNet) == 3


def test_groups_equal_one_batch_after_the_other() -> None:
    """Outputs, gradients, running statistics and counters of the experts, in the order of the batches."""
    together = SemiMoE(width=4).double().train()
    apart = copy.deepcopy(together)
    batches = torch.randn(2, 3, 3, 32, 48, dtype=torch.float64)

    def outputs(model: SemiMoE, images: Tensor, groups: int = 1) -> Tensor:
        means, projections, own = model.run_experts(images, groups)
        return torch.cat([means.flatten(1), projections.flatten(1), *(x.flatten(1) for x in own)], 1)

    results = [outputs(together, batches.flatten(0, 1), groups=2), torch.cat([outputs(apart, x) for x in batches])]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for result in results:
        result.square().mean().backward()
    for one, other in zip(together.experts.parameters(), apart.experts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-12)
    for one, other in zip(together.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert together.experts[0].encoder[0][1].num_batches_tracked == 2


@pytest.mark.parametrize(("unlabeled", "calls"), [(2, 1), (3, 2)])
def test_batches_of_one_size_go_through_the_experts_together(monkeypatch, unlabeled: int, calls: int) -> None:
    sizes = []
    run_experts = SemiMoE.run_experts

    def spy(model: SemiMoE, images: Tensor, groups: int = 1) -> tuple:
        sizes.append(len(images))
        return run_experts(model, images, groups)

    monkeypatch.setattr(SemiMoE, "run_experts", spy)
    mask = torch.randint(0, 2, (2, 32, 32))
    images, others = torch.randn(2, 3, 32, 32), torch.randn(unlabeled, 3, 32, 32)
    objective(SemiMoE(width=4), AdaptiveMultiObjectiveLoss(), images, (mask, *F.distance_targets(mask)), others, 0.5)
    assert sizes == ([4] if calls == 1 else [3, 2])


def test_frozen_batch_norm_keeps_its_statistics_and_counts_nothing() -> None:
    model = SemiMoE(width=4).train()
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    before = copy.deepcopy(norms)
    model.run_experts(torch.randn(2, 3, 32, 32))
    for norm, old in zip(norms, before, strict=True):
        for buffer, expected in zip(norm.buffers(), old.buffers(), strict=True):
            assert torch.equal(buffer, expected)


@pytest.mark.parametrize("head", [False, True])
def test_backward_pre_hooks_fire(head):
    model, fired = SemiMoE(width=2), []
    module = model.experts[1].head if head else model.experts[1]
    module.register_full_backward_pre_hook(lambda *_: fired.append(1))
    output = model(torch.randn(2, 3, 32, 32, requires_grad=True))
    (output.mask.sum() + output.own[1].sum()).backward()
    assert fired
