"""`python -m benchmarks.static_report`: resources and memory traffic of the Triton kernels, without a GPU.

Prints two tables at the sizes of a training step. The first has the registers, spills, shared memory and instructions
of every kernel, from its machine code for each GPU generation. The second compares the bytes that each operation moves,
counted from its launches, with the minimum. `--json FILE` also writes them to a file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch
from semimoe_fast.kernels import adaptive, batch_norm, fold_upsampling, mix_projections, objective, project_experts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launches import Launch, recorded
from .tables import markdown

BATCH, EXPERTS, CHANNELS, SIDE = 8, 3, 64, 256
HEADS = OWN = (2, 1, 2)
PIXELS = BATCH * SIDE * SIDE
GROUPS = 2  # of the images of a batch normalization
CAPABILITIES = (80, 90, 100)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}

Operation = Callable[[], Any]


def operations(dtype: torch.dtype, layout: torch.memory_format) -> Iterator[tuple[str, int, Operation]]:
    """Every operation on meta tensors: name, minimum number of bytes that it must move, call."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def image(channels: int) -> Tensor:
        return empty(BATCH, channels, SIDE, SIDE)

    features = [image(CHANNELS).contiguous(memory_format=layout) for _ in range(EXPERTS)]
    weights, own_biases = empty(sum(HEADS) + sum(OWN), CHANNELS), empty(sum(OWN), dtype=torch.float32)
    own = [image(rows) for rows in OWN]
    means = empty(BATCH, EXPERTS, CHANNELS, dtype=torch.float32)
    projections = empty(BATCH, EXPERTS, sum(HEADS), SIDE, SIDE)
    gates, biases = empty(BATCH, len(HEADS), EXPERTS, dtype=torch.float32), empty(sum(HEADS), dtype=torch.float32)
    gated = [image(rows) for rows in HEADS]
    feature_bytes, z, out, own_bytes = (size(tensors) for tensors in (features, [projections], gated, own))

    def forward() -> None:
        project_experts.forward(features, weights, own_biases, OWN)
        mix_projections.forward(projections, gates, biases, HEADS)

    def backward() -> None:
        mix_projections.backward(projections, gates, gated)
        project_experts.backward(features, weights, OWN, means, projections, own)

    yield "multi-gate forward", feature_bytes + 2 * z + out + own_bytes, forward
    yield "multi-gate backward", 2 * feature_bytes + z + 2 * out + own_bytes, backward
    labels = PIXELS * (2 + dtype.itemsize)
    yield "pseudo-labels", z + labels, lambda: mix_projections.labels(projections, gates, biases, HEADS[0])

    x, bytes_x = features[0], size(features[:1])
    channel, statistics = (empty(*shape, CHANNELS, dtype=torch.float32) for shape in ((), (GROUPS,)))
    affine = channel, channel
    yield (
        "batch norm forward",
        3 * bytes_x,
        lambda: batch_norm.batch_norm_relu_fwd(x, *affine, 1e-5, GROUPS),
    )
    running = channel, channel, statistics, statistics
    yield (
        "batch norm running statistics",
        size(running),
        lambda: batch_norm.update_running(*running, 0.1, 1e-5, PIXELS),
    )
    yield "batch norm evaluation", 2 * bytes_x, lambda: batch_norm.batch_norm_relu_eval(x, *affine, channel, channel)
    yield (
        "batch norm backward",
        5 * bytes_x,
        lambda: batch_norm.batch_norm_relu_bwd(x, x, *affine, statistics, statistics, GROUPS),
    )

    if layout == torch.channels_last:  # as the trainer has its weights
        levels = [(CHANNELS * 2**level, CHANNELS * 2 ** (level + 1)) for level in range(4)] * EXPERTS
        taps = [empty(o, c, 3, 3, dtype=torch.float32).contiguous(memory_format=layout) for o, c in levels]
        kernels = [empty(c, o, 4, 4).contiguous(memory_format=layout) for o, c in levels]
        folded = size([*taps, *kernels])
        yield "folding forward", folded, lambda: fold_upsampling.forward(taps, dtype)
        yield "folding backward", folded, lambda: fold_upsampling.backward(kernels, torch.float32, layout)

    byte, sdf = empty(BATCH, 1, SIDE, SIDE, dtype=torch.uint8), empty(BATCH, 1, SIDE, SIDE, dtype=torch.float32)
    targets, sums = [byte, sdf, byte], empty(BATCH, 8, dtype=torch.float32)
    predictions = [own, gated]
    terms = empty(3, dtype=torch.float32)
    reads = out + own_bytes + size([byte, byte, sdf])
    yield "objective forward", reads, lambda: objective.forward(predictions, targets, torch.float32)
    yield (
        "objective backward",
        reads + out + own_bytes,
        lambda: objective.backward(terms, predictions, targets, sums, sums),
    )

    log_vars, total, settings = torch.empty_like(terms), empty(dtype=torch.float32), ((1.0, 0.5, 1.0), 0.4)
    few = size([terms, log_vars, total])
    yield "adaptive loss forward", few, lambda: adaptive.forward(terms, log_vars, *settings)
    yield (
        "adaptive loss backward",
        few + size([terms, log_vars]),
        lambda: adaptive.backward(total, terms, log_vars, *settings),
    )


def size(tensors: Sequence[Tensor]) -> int:
    """Size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class OperatorBytes(TorchDispatchMode):
    """Counts the bytes that PyTorch's own operators read and write, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not is_view and "empty" not in func.name():
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.bytes += size(tensors)
        return result


def run(operation: Operation, capability: int) -> tuple[list[Launch], int]:
    """Run an operation; return its launches, and the bytes that they and PyTorch's operators move."""
    operators = OperatorBytes()
    with recorded(capability) as launches, operators:
        operation()
    return launches, operators.bytes + sum(launch.bytes for launch in launches)


def report() -> dict[str, list[dict[str, Any]]]:
    """The rows of both tables."""
    kernels, traffic = [], []
    for dtype_name, dtype in DTYPES.items():
        for layout_name, layout in LAYOUTS.items():
            case = {"dtype": dtype_name, "layout": layout_name}
            for name, floor, operation in operations(dtype, layout):
                if layout_name != "NCHW" and not name.startswith(("multi-gate", "batch norm", "folding")):
                    continue  # projections and logits are always NCHW
                for capability in CAPABILITIES:
                    launches, moved = run(operation, capability)
                    kernels += [
                        {"operation": name, **case, "sm": capability, **describe(launch)} for launch in launches
                    ]
                per_pixel = {"bytes a pixel": moved / PIXELS, "floor": floor / PIXELS, "ratio": moved / floor}
                traffic.append({"operation": name, **case, **per_pixel})
    return {"kernels": kernels, "traffic": traffic}


def describe(launch: Launch) -> dict[str, Any]:
    loads, stores = launch.count(r"LDG[.\w]*"), launch.count(r"STG[.\w]*")
    wide_loads, wide_stores = launch.count(r"LDG[.\w]*\.128[.\w]*"), launch.count(r"STG[.\w]*\.128[.\w]*")
    return {
        "kernel": launch.kernel,
        **launch.resources,
        "spills": launch.spills,
        "128-bit loads": wide_loads,
        "other loads": loads - wide_loads,
        "128-bit stores": wide_stores,
        "other stores": stores - wide_stores,
        "tensor-core instructions": launch.count(r"(?:HMMA|HGMMA|UTC\w*MMA)[.\w]*"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the tables to")
    file = parser.parse_args().json
    tables = report()
    for rows in tables.values():
        cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
        print(markdown([*rows[0]], cells))
    if file is not None:
        file.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
