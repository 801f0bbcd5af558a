"""Run the native and the Triton kernels on small inputs with edge-case shapes, under NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize CASE

CASE: one of `CASES`. A capture case needs a process in which the captured path has not run yet. The results are also
checked: native results equal those of the CPU bit for bit, the others are finite.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from semimoe_fast import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEIGHTS, WIDTHS = (1, 32, 33, 256), (1, 33, 256, 300)
CLUSTER, LAUNCHES = (4, 256, 256), (2, 300, 500)  # shapes of the cluster path and of the general path
HEADS = (2, 1, 2)
FEATURES = ((1, 1, 1), (5, 1, 33), (64, 33, 32))  # channels, height, width
LOGITS = ((1, 1), (1, 33), (32, 32), (33, 257))  # height, width


def masks(height: int, width: int) -> Iterator[Tensor]:
    """uint8 masks (B, height, width): noise, single dots in two corners and in the middle, and a constant."""
    random = torch.Generator().manual_seed(height + 1000 * width)
    yield (torch.rand(2, height, width, generator=random) < 0.3).to(torch.uint8)
    for y, x in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        dot = torch.zeros(2, height, width, dtype=torch.uint8)
        dot[0, y, x] = 1
        dot[1] = 1 - dot[0]
        yield dot
    yield torch.ones(1, height, width, dtype=torch.uint8)


def maps(height: int, width: int) -> Iterator[Tensor]:
    """Instance maps (2, height, width) of all integer types: squares that touch, and one pixel in a large instance."""
    random = torch.Generator().manual_seed(height + 1000 * width)
    squares = torch.randint(0, 4, (2, height // 5 + 1, width // 5 + 1), generator=random)
    labels = squares.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        yield labels.to(dtype)
    dot = torch.ones(2, height, width, dtype=torch.int32)
    dot[:, height // 2, 0] = 2
    yield dot


def check_distances(labels: Tensor, results: Sequence[Tensor], instances: bool = False) -> None:
    for result, expected in zip(results, F.distance_targets(labels, instances=instances), strict=True):
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0)


def native() -> None:
    shapes = [(height, width) for height in HEIGHTS for width in WIDTHS]
    for height, width in [*shapes, LAUNCHES[1:]]:
        for mask in masks(height, width):
            check_distances(mask, F.distance_targets(mask.to(DEVICE)))
            on_device = F.squared_distance(mask.to(DEVICE, torch.int64))
            assert torch.equal(on_device.cpu(), F.squared_distance(mask))


def instances() -> None:
    shapes = [(height, width) for height in HEIGHTS for width in WIDTHS]
    for height, width in [*shapes, LAUNCHES[1:]]:
        for labels in maps(height, width):
            check_distances(labels, F.distance_targets(labels.to(DEVICE), instances=True), instances=True)
            on_device = F.squared_distance(labels.to(DEVICE), instances=True)
            assert torch.equal(on_device.cpu(), F.squared_distance(labels, instances=True))


def capture(shape: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    """Capture the path of one shape after the path of the other shape has run."""
    F.distance_targets(torch.ones(other, dtype=torch.uint8, device=DEVICE))
    mask = next(masks(*shape[1:]))
    static = mask.to(DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = F.distance_targets(static)
    graph.replay()
    check_distances(mask, results)


def draw(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)
    return (tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor).requires_grad_()


def differentiate(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))


def gating() -> None:
    """project_experts, mix_projections and label_projections, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for channels, height, width in FEATURES:
                features = [draw(2, channels, height, width, dtype=dtype, channels_last=channels_last) for _ in HEADS]
                weights, biases = [draw(rows, channels) for rows in HEADS], [draw(rows) for rows in HEADS]
                gates = draw(2, 3, 3)
                means, projections, own = F.project_experts(features, weights, weights, biases)
                outputs = [means, *F.mix_projections(projections, gates, biases), *own]
                differentiate(outputs, [*features, *weights, *biases, gates])
                F.label_projections(projections.detach(), gates.detach(), [bias.detach() for bias in biases])


def objective() -> None:
    """joint_objective_terms and adaptive_loss, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for height, width in LOGITS:
            sets = [[draw(2, rows, height, width, dtype=dtype) for rows in HEADS] for _ in range(2)]
            mask = torch.randint(0, 2, (2, height, width), dtype=torch.uint8).to(DEVICE)
            terms = F.joint_objective_terms(sets, mask, 2.0 * mask - 1, 1 - mask)
            log_vars = draw(3)
            differentiate([F.adaptive_loss(terms, log_vars)], [*sets[0], *sets[1], log_vars])


def normalization() -> None:
    """batch_norm_relu, forward and backward, with running statistics, and fold_upsampling."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for channels, height, width in FEATURES:
                x = draw(4, channels, height + 1, width, dtype=dtype, channels_last=channels_last)
                weight, bias = draw(channels), draw(channels)
                running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
                y = F.batch_norm_relu(x, weight, bias, *running, groups=2)
                differentiate([y], [x, weight, bias])
                with torch.no_grad():
                    assert F.batch_norm_relu(x, weight, bias, *running, training=False).isfinite().all()
            weights = [draw(rows, 8 * rows, 3, 3, channels_last=channels_last) for rows in (1, 5, 16)]
            differentiate(F.fold_upsampling(weights, dtype), weights)


CASES: dict[str, Callable[[], None]] = {
    "native": native,
    "instances": instances,
    "capture cluster": lambda: capture(CLUSTER, LAUNCHES),
    "capture launches": lambda: capture(LAUNCHES, CLUSTER),
    "gating": gating,
    "objective": objective,
    "normalization": normalization,
}


def main() -> None:
    os.environ["SEMIMOE_BACKEND"] = "fused"  # no fallback to another backend
    CASES[sys.argv[1]]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{sys.argv[1]}: done")


if __name__ == "__main__":
    main()
