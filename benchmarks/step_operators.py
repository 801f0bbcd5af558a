"""Operators and memory traffic of one training step: forward and backward of `objective`, by kind.

    python -m benchmarks.step_operators                     # Markdown tables, width 64, 2 + 2 images of 256 x 256
    python -m benchmarks.step_operators --batch 8
    python -m benchmarks.step_operators --width 8 --size 64 --fp32

Counted are the calls that a TorchDispatchMode sees, on fake tensors: nothing is computed. Views move no bytes. Every
other operator reads its tensors once and writes its results once, but for batch normalization, which reads its feature
maps (and in backward their gradient) twice, and copies a gradient that is not contiguous. The precision is bf16
autocast or, with --fp32, float32.

The milliseconds are predictions, not measurements: bytes over the memory bandwidth, the convolutions' operations over
rates that are assumed for them, and a gap between two kernels. The optimizer reads weight, gradient and
momentum of every parameter in float32 and writes weight and momentum.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE
from semimoe_fast.objective import objective

KINDS = {  # the first kind of which a name holds one of the words
    "batch norm and ReLU": ("batch_norm", "relu", "threshold_backward", "lerp"),
    "convolution": ("convolution",),
    "gates and losses": ("project_experts", "mix_projections", "label_projections", "objective_", "adaptive"),
    "concatenation, pooling, sums of gradients": ("cat", "max_pool2d", "add", "slice_backward", "pad"),
    "upsampling weights, casts and copies": ("fold_upsampling", "copy", "stack", "empty_strided"),
}
OTHER = "other"
GRADIENTS = "batch_norm_relu_gradients"
READ_TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2, "batch_norm_relu": 1, GRADIENTS: 2}

BANDWIDTH = {"H100": 3.0e12, "H200": 4.2e12}  # bytes a second
CONVOLUTION_RATE = {2: 340e12, 8: 450e12}  # floating-point operations a second in bf16, by images of a batch
GAP = 1e-6  # seconds from one kernel to the next in a CUDA graph
OPTIMIZER_BYTES = 20  # per parameter


@dataclass
class Operators(TorchDispatchMode):
    """Counts operators, and the bytes that they read and write, by name."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if namespace not in ("aten", "semimoe_fast"):  # questions of fake tensors, marks of the profiler
            return result
        self.calls[name] += 1
        if not function.is_view and name != "detach":
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            twice = READ_TWICE.get(name, 0)
            copied = inputs[:1] if name == GRADIENTS and not is_dense(inputs[0]) else []
            self.bytes[name] += size([*inputs, *inputs[:twice], *copied, *copied, *tree_leaves(result)])
        return result

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Calls and bytes by kind."""
        sums = dict.fromkeys((*KINDS, OTHER), (0, 0))
        for name, calls in self.calls.items():
            kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)
            sums[kind] = sums[kind][0] + calls, sums[kind][1] + self.bytes[name]
        return sums


def size(tensors: Iterable[Any]) -> int:
    """Bytes of tensors. An expanded dimension is read once."""
    return sum(tensor.element_size() * _elements(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def _elements(tensor: Tensor) -> int:
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


class Count(NamedTuple):
    operators: Operators
    convolutions: int  # floating-point operations
    parameters: int
    batch: int


def count(width: int, size: int, batch: int, bf16: bool) -> Count:
    """Operators of a step on `batch` labeled and as many unlabeled images of size x size pixels."""
    operators, flops = Operators(), FlopCounterMode(display=False)
    model = SemiMoE(width=width).to(memory_format=torch.channels_last)
    adaptive = AdaptiveMultiObjectiveLoss()
    with FakeTensorMode() as fake:
        for module in (*model.modules(), adaptive):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, fake.from_tensor(parameter))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer))
        images, unlabeled = (
            torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        mask, sdf, boundary = (
            torch.empty(batch, size, size, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int64)
        )
        for counter in (operators, flops):  # apart: the second one sets hooks, with which the experts' heads run alone
            with counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    losses = objective(model, adaptive, images, (mask, sdf, boundary), unlabeled, 0.1)
                losses.total.backward()
            model.zero_grad()
            adaptive.zero_grad()
    counts = flops.get_flop_counts()["Global"]
    convolutions = sum(counts[op] for op in counts if "convolution" in str(op))
    return Count(operators, convolutions, sum(parameter.numel() for parameter in model.parameters()), batch)


def rows(counted: Count) -> Iterator[tuple[str, int, float, list[float]]]:
    """Kind, calls, gigabytes and the predicted milliseconds on each GPU."""
    optimizer = OPTIMIZER_BYTES * counted.parameters
    rate = CONVOLUTION_RATE[2 if counted.batch < 8 else 8]
    for kind, (calls, moved) in {**counted.operators.by_kind(), "SGD": (1, optimizer)}.items():
        work = [
            counted.convolutions / rate if kind == "convolution" else moved / bandwidth
            for bandwidth in BANDWIDTH.values()
        ]
        yield kind, calls, moved / 1e9, [1e3 * (seconds + calls * GAP) for seconds in work]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="labeled images, and as many unlabeled ones")
    parser.add_argument("--fp32", action="store_true")
    arguments = parser.parse_args()
    counted = count(arguments.width, arguments.size, arguments.batch, not arguments.fp32)
    print(f"convolutions: {counted.convolutions / 1e12:.2f} TFLOP\n")
    print(f"| kind | calls | GB | {' | '.join(f'predicted ms, {gpu}' for gpu in BANDWIDTH)} |")
    print(f"| --- | --- | --- |{' --- |' * len(BANDWIDTH)}")
    table = list(rows(counted))
    totals = [sum(column) for column in zip(*(milliseconds for *_, milliseconds in table), strict=True)]
    table.append(("all", sum(row[1] for row in table), sum(row[2] for row in table), totals))
    for kind, calls, gigabytes, milliseconds in table:
        print(f"| {kind} | {calls} | {gigabytes:.3f} | {' | '.join(f'{ms:.2f}' for ms in milliseconds)} |")


if __name__ == "__main__":
    main()
