"""Arguments that batch normalization refuses, each in one clear line."""

from __future__ import annotations

import pytest
import torch

import semimoe_fast
from semimoe_fast import functional as F
from semimoe_fast.ops import _native_batch_norm


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"x": torch.zeros(4, 3, 5)}, {}, ValueError, r"x is \(B, C, H, W\)"),
        ({"bias": torch.zeros(4)}, {}, ValueError, r"x is \(B, C, H, W\), and weight, bias, .* are \(C,\)"),
        ({"running_var": torch.zeros(1, 3)}, {}, ValueError, r"are \(C,\)"),
        ({"running_var": None}, {}, TypeError, "running_var: a tensor is needed"),
        ({"x": torch.zeros(4, 3, 5, 5).long()}, {}, TypeError, "x: floating-point numbers are needed"),
        ({"running_mean": None, "running_var": None}, {"training": False}, ValueError, "evaluation needs running_mean"),
        ({}, {"groups": 3}, ValueError, "groups is 3, but 4 images are no 3 equal runs"),
        ({}, {"groups": 0}, ValueError, "groups is 0"),
        ({"x": torch.zeros(4, 3, 1, 1)}, {"groups": 4}, ValueError, "more than 1 value per channel in each run"),
        ({"x": torch.zeros(0, 3, 5, 5)}, {}, ValueError, "more than 1 value per channel"),
    ],
)
def test_bad_arguments_get_one_clear_line(change, options, error: type[Exception], message: str) -> None:
    channels = {name: torch.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    arguments = {"x": torch.randn(4, 3, 5, 5)} | channels | change
    with pytest.raises(error, match=message) as caught:
        F.batch_norm_relu(**arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x.double(), "in the layout of x"),
        (0, lambda x: x.contiguous(memory_format=torch.channels_last), "in the layout of x"),
        (0, lambda x: x[..., :3], "in the layout of x"),
        (1, lambda x: x.double(), "float32, bfloat16 or float16 on the CPU"),
        (1, lambda x: x.to("meta"), "on the CPU"),
        (1, lambda x: x.mT, "contiguous or channels-last"),
        (1, lambda x: x[0], r"feature maps are \(B, C, H, W\)"),
        (2, lambda x: x.double(), "expected contiguous torch.float32"),
        (3, lambda x: x[:2], "expected contiguous torch.float32"),
        (4, lambda x: x[:1], "expected contiguous torch.float32"),
        (5, lambda x: x.repeat(1, 2)[:, ::2], "expected contiguous torch.float32"),
    ],
)
def test_unsupported_tensors_are_refused(index: int, change, message: str) -> None:
    x = torch.randn(4, 3, 4, 5)
    tensors = [x, x.clone(), torch.ones(3), torch.ones(3), torch.zeros(2, 3), torch.ones(2, 3)]
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=message) as caught:
        _native_batch_norm.batch_norm_relu_bwd(*tensors, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("default_backend")
def test_running_statistics_of_other_kinds():
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.ones(3), torch.zeros(3)
    results = []
    for backend in ("reference", "fused"):
        mean, var = torch.zeros(3), torch.ones(6)[::2]
        with semimoe_fast.backend(backend):
            F.batch_norm_relu(x, weight, bias, mean, var)
        results.append((mean, var))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("default_backend")
def test_strided_parameters():
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(6)[::2], torch.randn(6)[1::2]
    results = []
    for backend in ("reference", "fused"):
        with semimoe_fast.backend(backend):
            results.append(F.batch_norm_relu(x, weight, bias, None, None))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("default_backend")
def test_running_variance_of_a_constant_is_not_negative():
    for eps in (1e-5, 1e-3, 0.1, 3e-4):
        for backend in ("portable", "fused"):
            mean, var = torch.zeros(3), torch.ones(3)
            with semimoe_fast.backend(backend):
                F.batch_norm_relu(
                    torch.zeros(2, 3, 4, 5), torch.ones(3), torch.zeros(3), mean, var, momentum=1.0, eps=eps
                )
            assert (var >= 0).all()


def test_skip_on_another_device():
    x, ones = torch.randn(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match="skip is on meta, x on cpu: move them to one device"):
        F.batch_norm_relu(x, ones, ones, None, None, skip=x.to("meta"))
