"""The numbers of operators and bytes of a training step, by benchmarks/step_operators.py."""

from __future__ import annotations

import pytest

operators_of = pytest.importorskip(
    "benchmarks.step_operators", reason="needs the source tree, and tests run from its root"
)


def test_operators_of_a_step() -> None:
    """Both batches go through each of the experts' convolutions together. Upsampling weights are folded once."""
    counted = operators_of.count(width=8, size=64, batch=2, bf16=False)
    calls = counted.operators.calls
    assert calls["convolution"] == calls["convolution_backward"] == 3 * 22
    assert calls["batch_norm_relu"] == calls["batch_norm_relu_gradients"] == 3 * 22
    assert calls["fold_upsampling"] == calls["fold_upsampling_gradients"] == 1
    assert calls.total() <= 1050  # 1,036 with PyTorch 2.13
    assert counted.convolutions > 1e9


def test_bytes_of_a_step() -> None:
    """At width 64 and 256 x 256, batch normalization moves 2 + 1 and 4 + 1 times its feature maps, and little else."""
    operators = operators_of.count(width=64, size=256, batch=2, bf16=True).operators
    maps = 4 * 3 * 2 * sum(_elements_of_level(level) for level in range(5))  # images, experts, bytes
    assert (
        maps * 8 <= sum(operators.bytes[name] for name in operators_of.READ_TWICE) <= maps * 8 * 1.06
    )  # a gradient is copied
    assert sum(moved for kind, (_, moved) in operators.by_kind().items() if kind != "convolution") < 12.3e9
    assert operators.by_kind()[operators_of.OTHER][1] < 0.1e9


def _elements_of_level(level: int) -> int:
    """Elements of the normalized feature maps of an image: two of the encoder, and three of the decoder above it."""
    return (2 if level == 4 else 5) * 64 * 2**level * (256 // 2**level) ** 2
