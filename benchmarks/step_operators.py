"""Operators and memory traffic of one training step: forward and backward of `objective`, by kind.

    python -m benchmarks.step_operators                     # Markdown tables, width 64, 2 + 2 images of 256 x 256
    python -m benchmarks.step_operators --width 8 --size 64

Counted are the calls that a TorchDispatchMode sees, on fake tensors: nothing is computed. Views move no bytes. Every
other operator reads its tensors once and writes its results once, but for batch normalization, which reads its feature
maps (and in backward their gradient) twice. Convolutions work from caches and tensor cores, so their bytes are listed
but say little about their time. The precision is bf16 autocast; --fp32 takes float32.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE
from semimoe_fast.objective import objective

KINDS = {  # the first kind of which a name holds one of the words
    "batch norm and ReLU": ("batch_norm", "batch_norm_relu", "relu", "threshold_backward", "lerp"),
    "convolution": ("convolution",),
    "gates and losses": ("semimoe_fast",),
    "concatenation, pooling, sums of gradients": ("cat", "max_pool2d", "add", "slice_backward", "pad"),
    "upsampling weights, casts and copies": (
        "_to_copy",
        "copy",
        "clone",
        "stack",
        "flip",
        "pool",
        "upsample",
        "unbind",
    ),
}
OTHER = "other"
READ_TWICE = {
    "native_batch_norm": 1,
    "native_batch_norm_backward": 2,
    "batch_norm_relu": 1,
    "batch_norm_relu_gradients": 2,
}


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
            self.bytes[name] += size(inputs) + size(inputs[:twice]) + size(tree_leaves(result))
        return result

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Calls and bytes of each kind."""
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


def count(width: int, size: int, batch: int, bf16: bool) -> Operators:
    """Operators of a step on `batch` labeled and as many unlabeled images of size x size pixels."""
    counter = Operators()
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
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses = objective(model, adaptive, images, (mask, sdf, boundary), unlabeled, 0.1)
            losses.total.backward()
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--names", action="store_true", help="also the calls and bytes of every operator")
    arguments = parser.parse_args()
    counter = count(arguments.width, arguments.size, arguments.batch, not arguments.fp32)
    print("| kind | calls | GB |\n| --- | --- | --- |")
    for kind, (calls, moved) in counter.by_kind().items():
        print(f"| {kind} | {calls} | {moved / 1e9:.3f} |")
    print(f"| all | {counter.calls.total()} | {counter.bytes.total() / 1e9:.3f} |")
    if arguments.names:
        for name, calls in counter.calls.most_common():
            print(f"{calls:6} {counter.bytes[name] / 1e6:10.2f} MB  {name}")


if __name__ == "__main__":
    main()
