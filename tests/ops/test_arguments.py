"""Wrong arguments of the public operations: one clear line that names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from semimoe_fast import functional as F
from semimoe_fast.evaluation import object_scores

LOSSES = ("squared_dice_loss", "soft_dice_loss")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def gate_with_shapes(gates: tuple[int, ...], weight: tuple[int, ...], bias: int) -> None:
    """Call multi_gate on one expert of two channels with one head."""
    F.multi_gate([zeros(1, 2, 4, 4)], zeros(*gates), [zeros(*weight)], [zeros(bias)])


def joint_terms(predictions: list[tuple[Tensor, ...]]) -> None:
    F.joint_objective_terms(predictions, zeros(1, 4, 4).long(), zeros(1, 4, 4), zeros(1, 4, 4).long())


ONE_SET = (zeros(1, 2, 4, 4), zeros(1, 1, 4, 4), zeros(1, 2, 4, 4))
TWO_IMAGE_SIZES = (  # the mask differs from sdf and boundary
    *(zeros(1, 2, 8, 8), zeros(1, 1, 4, 4), zeros(1, 2, 4, 4)),
    *(zeros(1, 8, 8).long(), zeros(1, 4, 4), zeros(1, 4, 4).long()),
)
OTHER_SDF_SIZE = (zeros(1, 2, 8, 8), zeros(1, 1, 4, 4), zeros(1, 2, 8, 8))
OTHER_SDF_TARGETS = (zeros(1, 8, 8).long(), zeros(1, 4, 4), zeros(1, 8, 8).long())
ONE_HEAD = ([zeros(1, 2, 4, 4)], zeros(1, 1, 1), [zeros(2, 2)], [zeros(2)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.squared_dice_loss(zeros(1, 2, 4, 4), zeros(1, 4, 5).long()), ValueError, "disagree"),
        (lambda: F.soft_dice_loss(zeros(1, 2, 4, 4), zeros(1, 4, 4) + 0.5), TypeError, "values other than 0 and 1"),
        (lambda: F.tanh_mse_loss(zeros(2, 1, 4, 4), zeros(1, 4, 4)), ValueError, "disagree"),
        (lambda: F.tanh_mse_loss(zeros(2, 2, 4, 4), zeros(2, 4, 4)), ValueError, "disagree"),
        (lambda: joint_terms([]), ValueError, "S tuples"),
        (lambda: joint_terms([(zeros(1, 2, 4, 4), zeros(1, 1, 4, 4))]), ValueError, "S tuples"),
        (lambda: joint_terms([ONE_SET, (zeros(1, 3, 4, 4), *ONE_SET[1:])]), ValueError, "the classes of the first"),
        (lambda: joint_terms([ONE_SET, (zeros(1, 2, 4, 5), *ONE_SET[1:])]), ValueError, "disagree"),
        (lambda: F.adaptive_loss(zeros(3), zeros(2)), ValueError, "as many terms"),
        (lambda: F.objective_terms(*TWO_IMAGE_SIZES), ValueError, "of the same images"),
        (lambda: F.objective_terms(*OTHER_SDF_SIZE, *OTHER_SDF_TARGETS), ValueError, "of the same images"),
        (lambda: F.project_experts([zeros(1, 2, 4, 4)], [zeros(1, 2)], (), [zeros(2)]), ValueError, "own_biases match"),
        (lambda: F.multi_gate([], zeros(1, 1, 2), [], []), ValueError, "features are E tensors"),
        (lambda: gate_with_shapes((1, 1, 2), (2, 2), 2), ValueError, "gate_weights"),
        (lambda: gate_with_shapes((1, 1, 1), (2, 3), 2), ValueError, "head_weights"),
        (lambda: gate_with_shapes((1, 1, 1), (2, 2), 3), ValueError, "head_biases"),
        (lambda: gate_with_shapes((1, 1, 1), (2,), 2), ValueError, "head_weights"),
        (lambda: gate_with_shapes((1, 1, 1), (2, 1, 1, 2), 2), ValueError, "head_weights"),
        (lambda: F.squared_dice_loss(zeros(), zeros()), ValueError, "disagree"),
        (lambda: F.tanh_mse_loss(zeros(), zeros()), ValueError, "disagree"),
        (lambda: F.mix_projections(zeros(1, 1, 1, 4, 4), zeros(1, 1, 1), [zeros()]), ValueError, "head_biases"),
        (lambda: F.pseudo_labels(*ONE_HEAD), ValueError, "pseudo_labels takes"),
        (
            lambda: F.label_projections(zeros(1, 1, 260, 4, 4), zeros(1, 3, 1), [*map(zeros, (257, 1, 2))]),
            ValueError,
            "label_projections gives labels in uint8, so a head has at most 256 rows, got rows [257, 1, 2]",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["squared_dice_loss", "soft_dice_loss", "objective: mask", "objective: boundary"])
def test_one_channel_is_refused_with_the_remedy(name: str) -> None:
    """Softmax over one channel is 1 everywhere, so the loss has no gradient. The remedy in the message has one."""
    one, two, classes = zeros(1, 1, 4, 4), zeros(1, 2, 4, 4), zeros(1, 4, 4).long()

    def loss(logits: Tensor) -> Tensor:
        if name in LOSSES:
            return getattr(F, name)(logits, classes)
        mask_logits, boundary_logits = (logits, two) if name.endswith("mask") else (two, logits)
        return F.objective_terms(mask_logits, one, boundary_logits, classes, classes.float(), classes)

    with pytest.raises(
        ValueError, match=r"1 channel\(s\) have no gradient.* x torch.cat\(\[torch.zeros_like\(x\), x\], 1"
    ):
        loss(one)
    x = one.clone().requires_grad_()
    loss(torch.cat([torch.zeros_like(x), x], 1)).sum().backward()
    assert x.grad.any()


TENSORS = {  # valid arguments of every operation
    "multi_gate": ONE_HEAD,
    "pseudo_labels": ([zeros(1, 2, 4, 4)], zeros(1, 3, 1), [zeros(o, 2) for o in (2, 1, 2)], [*map(zeros, (2, 1, 2))]),
    "project_experts": ([zeros(1, 2, 4, 4)], [zeros(2, 2)], [zeros(2, 2)], [zeros(2)]),
    "mix_projections": (zeros(1, 1, 2, 4, 4), zeros(1, 1, 1), [zeros(2)]),
    "label_projections": (zeros(1, 1, 5, 4, 4), zeros(1, 3, 1), [*map(zeros, (2, 1, 2))]),
    "squared_dice_loss": (zeros(1, 2, 4, 4), zeros(1, 4, 4).long()),
    "soft_dice_loss": (zeros(1, 2, 4, 4), zeros(1, 4, 4).long()),
    "tanh_mse_loss": (zeros(1, 1, 4, 4), zeros(1, 4, 4)),
    "objective_terms": (*ONE_SET, zeros(1, 4, 4).long(), zeros(1, 4, 4), zeros(1, 4, 4).long()),
    "joint_objective_terms": ([ONE_SET], zeros(1, 4, 4).long(), zeros(1, 4, 4), zeros(1, 4, 4).long()),
    "adaptive_loss": (zeros(3), zeros(3)),
    "batch_norm_relu": (zeros(2, 3, 4, 4), *[zeros(3)] * 4),
    "fold_upsampling": ([zeros(2, 3, 3, 3), zeros(4, 2, 3, 3)],),
}


@pytest.mark.parametrize("name", TENSORS)
def test_only_tensors_on_one_device_are_taken(name: str) -> None:
    """Replace each tensor in turn by an array, None or a tensor on another device. One line names the argument."""
    leaves, structure = torch.utils._pytree.tree_flatten(TENSORS[name])
    operation = getattr(F, name)
    operation(*TENSORS[name])
    assert len(leaves) >= 2
    for i, leaf in enumerate(leaves):
        for wrong, error in ((leaf.numpy(), TypeError), (None, TypeError), (leaf.to("meta"), ValueError)):
            arguments = torch.utils._pytree.tree_unflatten([*leaves[:i], wrong, *leaves[i + 1 :]], structure)
            with pytest.raises(error, match=r"^\w+(: a tensor is needed.*torch\.as_tensor| is on .*\.to\(\))$"):
                operation(*arguments)


CLASSES_AND_TARGETS = {  # of the losses: leaves that may be integers
    **dict.fromkeys((*LOSSES, "tanh_mse_loss"), 1),
    **dict.fromkeys(("objective_terms", "joint_objective_terms"), 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_only_dense_floating_point_tensors_are_taken(name: str) -> None:
    """Integers, complex numbers, float8 and sparse tensors, where the result is a function of real numbers."""
    leaves, structure = torch.utils._pytree.tree_flatten(TENSORS[name])
    for i, leaf in enumerate(leaves[: CLASSES_AND_TARGETS.get(name)]):
        for wrong in (leaf.long(), leaf.cfloat(), leaf.to(torch.float8_e4m3fn), leaf.to_sparse()):
            arguments = torch.utils._pytree.tree_unflatten([*leaves[:i], wrong, *leaves[i + 1 :]], structure)
            needed = "a dense tensor is" if wrong.is_sparse else "floating-point numbers are"
            with pytest.raises(TypeError, match=rf"{needed} needed, got [^\n]*; use \.(float|to_dense)\(\)$"):
                getattr(F, name)(*arguments)


@pytest.mark.parametrize("name", ["multi_gate", "project_experts", "fold_upsampling"])
def test_iterators_are_refused(name: str) -> None:
    """They could be read only once."""
    first, *others = TENSORS[name]
    with pytest.raises(
        TypeError, match=r"a sequence of tensors is needed, got generator; use list\((features|weights)\)"
    ):
        getattr(F, name)((x for x in first), *others)


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.masked_array(np.ones((4, 4), np.uint8), mask=np.eye(4))
    for call in (F.squared_distance, F.distance_targets, lambda x: object_scores(x, x)):
        with pytest.raises(TypeError, match=r"would lose its mask: give \w+\.filled\(0\)"):
            call(masked)


@pytest.mark.parametrize("change", [{"eps": None}, {"momentum": "x"}, {"groups": 1.0}, {"training": None}])
def test_wrong_settings_of_batch_normalization_are_refused(change: dict) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(change))} (is )?({next(iter(change.values()))!r}|.*'x').*: give"):
        F.batch_norm_relu(*TENSORS["batch_norm_relu"], **change)


def test_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="dtype is float32: give a floating-point type"):
        F.fold_upsampling(*TENSORS["fold_upsampling"], dtype="float32")


def test_complex_targets_are_refused() -> None:
    with pytest.raises(TypeError, match=r"the target holds class numbers, got dtype torch\.complex64"):
        F.squared_dice_loss(zeros(1, 2, 4, 4), zeros(1, 4, 4).cfloat())
    with pytest.raises(TypeError, match=r"the sdf is of dtype torch\.complex64"):
        F.tanh_mse_loss(zeros(1, 1, 4, 4), zeros(1, 4, 4).cfloat())


def test_256_rows_are_as_many_as_uint8_names():
    rows = (256, 1, 2)
    mask, _, _ = F.label_projections(torch.randn(1, 1, sum(rows), 4, 4), torch.ones(1, 3, 1), [*map(zeros, rows)])
    assert mask.dtype == torch.uint8
