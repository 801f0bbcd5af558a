"""A training step without the overhead of Python: torch.compile of the U-Nets, and one CUDA graph of the step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..device import Compile
from .batches import map_tensors, tensors_of

MODES = {"default": "default", "max": "max-autotune-no-cudagraphs"}  # the step already is one CUDA graph
WARM_UP = 3  # eager steps before the capture, in which libraries choose algorithms and kernels compile

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def compile_experts(experts: nn.ModuleList, how: Compile) -> None:
    """Compile the forward pass of every expert for training; experts of the same width share one compilation.

    Evaluation stays eager, because torch.compile would recompile for each of its batch shapes.
    """
    if how == "none":
        return
    for expert in experts:
        expert.features = _compile(expert, expert.features, how)


def _compile(expert: nn.Module, eager: Callable[..., Tensor], how: Compile) -> Callable[..., Tensor]:
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, mode=MODES[how])
    return lambda *inputs: (compiled if expert.training else eager)(*inputs)


class GraphedStep:
    """A function `step(inputs)` that runs as a CUDA graph: captured once, then replayed with new inputs.

    Input shapes must be constant, and the step must update all its state in place. The first WARM_UP calls run eagerly
    on a side stream. The next call captures the graph, which runs no kernel, and replays it.
    """

    def __init__(self, step: Callable[[Any], None], device: torch.device, capture: Capture | None = None) -> None:
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.capture = capture or self._capture

    def __call__(self, inputs: Any) -> None:
        """Run the step. inputs: nested named tuples of tensors on the device."""
        if self.calls < WARM_UP:
            self._on_side_stream(lambda: self.step(inputs))
        else:
            if self.calls == WARM_UP:
                self.inputs = map_tensors(inputs, torch.clone)
                self.replay = self.capture(lambda: self.step(self.inputs))
            for static, given in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
                static.copy_(given)
            self.replay()
        self.calls += 1

    def _on_side_stream(self, call: Callable[[], None]) -> None:
        if self.stream is None:
            call()
            return
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            call()
        main.wait_stream(self.stream)

    def _capture(self, call: Callable[[], None]) -> Callable[[], None]:
        gc.collect()  # not during the capture: it might free another trainer's graph
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prepares batches may allocate pinned memory during the capture
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            call()
        return graph.replay
