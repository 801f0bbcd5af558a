"""A training step that Python does not slow down: the U-Nets compiled, the whole step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..device import Compile
from .batches import map_tensors, tensors_of

MODES = {"default": "default", "max": "max-autotune-no-cudagraphs"}  # the whole step is one graph already
WARM_UP = 3  # steps that let libraries choose their algorithms and kernels compile, before the graph is captured

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def compile_experts(experts: nn.ModuleList, how: Compile) -> None:
    """Let torch.compile make the features of every expert while it trains; one compilation serves those of one width.

    Evaluation stays eager: its batches have other shapes, each of which would be compiled anew.
    """
    if how == "none":
        return
    for expert in experts:
        expert.features = _choose(expert, expert.features, how)


def _choose(expert: nn.Module, eager: Callable[[Tensor], Tensor], how: Compile) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, mode=MODES[how])
    return lambda images: (compiled if expert.training else eager)(images)


class GraphedStep:
    """A step as a CUDA graph: `step(inputs)` of tensors whose shapes never change, replayed with new inputs.

    The step must read and write nothing else that moves: what it updates, it updates in place. Its first calls are
    executed as they are, on a stream beside, and count like any other; then it is captured, which executes nothing.
    """

    def __init__(self, step: Callable[[Any], None], device: torch.device, capture: Capture | None = None) -> None:
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.capture = capture or self._capture

    def __call__(self, inputs: Any) -> None:
        """Execute the step for inputs: named tuples of tensors on the device."""
        if self.calls < WARM_UP:
            self._beside(lambda: self.step(inputs))
        else:
            if self.calls == WARM_UP:
                self.inputs = map_tensors(inputs, torch.clone)
                self.replay = self.capture(lambda: self.step(self.inputs))
            for static, given in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
                static.copy_(given)
            self.replay()
        self.calls += 1

    def _beside(self, call: Callable[[], None]) -> None:
        if self.stream is None:
            call()
            return
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            call()
        main.wait_stream(self.stream)

    def _capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that makes the next batches may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            call()
        return graph.replay
