"""Record and compile Triton launches on meta tensors, without a GPU.

Triton specializes a kernel on its arguments (integers that are 1 or divisible by 16, aligned addresses), so the machine
code depends on the launch. Here the real launchers run on meta tensors, which have shapes and strides but no memory;
every launch is compiled and recorded, and none is executed.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Compute capability -> largest shared memory of a block, in bytes.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    binary: Any  # triton's CompiledKernel

    @property
    def bytes(self) -> int:
        """Size of all tensors of the launch. A kernel reads or writes each of them once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def disassembly(self) -> str:
        return _run_on(self.binary.asm["cubin"], "nvdisasm", "-c")

    @property
    def resources(self) -> dict[str, int]:
        """Registers and stack bytes per thread, and shared memory bytes per block."""
        usage = _run_on(self.binary.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        return {"registers": registers, "stack": stack, "shared": self.binary.metadata.shared}

    @property
    def spills(self) -> int:
        """Number of instructions that load from or store to local memory."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.disassembly))

    def count(self, instruction: str) -> int:
        """Number of instructions that match a regular expression, such as LDG.*128."""
        return len(re.findall(rf"\b{instruction}\b", self.disassembly))


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Record the launches of the `with` body for a compute capability such as 90, without executing them."""
    launches: list[Launch] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def record(self: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.fn.__name__, tuple(grid), tuple(_tensors((args, kwargs))), binary))
        return binary

    triton.runtime.driver.set_active(_NoDriver(capability))
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


class _NoDriver:
    """The part of a driver that compilation needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        shared = {"max_shared_mem": SHARED_MEMORY[capability]}
        self.utils = SimpleNamespace(get_device_properties=lambda device: shared)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


@functools.cache  # launches share binaries
def _run_on(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], check=True, capture_output=True, text=True).stdout
