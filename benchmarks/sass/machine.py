"""The machine that runs the threads of a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from .instructions import CONTROL, build
from .program import Instruction, Program
from .state import LANES, SHARED_START, SHARED_WINDOW, Block, Warp


class Machine:
    """Memory and state of the running cluster.

    Global memory begins at address `base`; a kernel may access the bytes of `buffers`, pairs of start and size.
    """

    base = 0x1000

    def __init__(
        self, program: Program, constants: bytes, memory: np.ndarray, buffers: Iterable[tuple[int, int]]
    ) -> None:
        self.program, self.memory = program, memory
        self.accessible = np.zeros(len(memory), bool)
        for start, size in buffers:
            self.accessible[start : start + size] = True
        self.constants = np.frombuffer(constants.ljust(0x1000, b"\0"), np.uint8)
        self.counts: Counter[int] = Counter()  # issues by position
        self.code: list[Callable | None] = [None] * len(program.instructions)  # compiled when first executed

    def run(self, blocks: int, cluster: int, threads: int, shared: int) -> None:
        """Run a grid of blocks in clusters; threads: of a block; shared: bytes of its memory."""
        for first in range(0, blocks, cluster):
            self.blocks = [
                Block(first + rank, rank, np.full(SHARED_START + shared, 0xA5, np.uint8)) for rank in range(cluster)
            ]
            for block in self.blocks:
                block.warps = [Warp(block, first) for first in range(0, threads, LANES)]
            warps = [warp for block in self.blocks for warp in block.warps]
            while warps:
                for warp in warps:
                    if warp.waits_for is None:
                        self.advance(warp)
                warps = [warp for warp in warps if warp.groups]
                self.release(warps)
                if warps and all(warp.waits_for for warp in warps):
                    raise RuntimeError("threads wait at a barrier that other threads never reach")

    def release(self, warps: list[Warp]) -> None:
        """Let the warps continue for which a barrier is complete. warps: those that have not ended."""
        of_cluster = all(warp.waits_for == "cluster" for warp in warps)
        for block in self.blocks:
            here = [warp for warp in warps if warp.block is block]
            if of_cluster or all(warp.waits_for == "block" for warp in here):
                block.votes = any(warp.vote for warp in here)
                for warp in here:
                    warp.waits_for, warp.vote = None, False

    def advance(self, warp: Warp) -> None:
        """Run a warp until it waits or ends."""
        code, counts = self.code, self.counts
        while warp.groups and warp.waits_for is None:
            position, active = warp.groups.pop()
            while position is not None:
                counts[position] += 1
                if code[position] is None:
                    code[position] = compiled(self, self.program.instructions[position])
                position, active = code[position](warp, position, active)
                if warp.waits_for is not None and position is not None:
                    warp.groups.append((position, active))
                    break

    def arrive(self, warp: Warp, name: str, lanes: np.ndarray) -> None:
        barrier = warp.barriers[name]
        barrier.arrived |= lanes
        self.complete(warp, name)

    def complete(self, warp: Warp, name: str) -> None:
        barrier = warp.barriers[name]
        if barrier.arrived.any() and (barrier.arrived == barrier.members).all():
            warp.groups.append((barrier.target, barrier.members.copy()))
            barrier.members, barrier.arrived = np.zeros(LANES, bool), np.zeros(LANES, bool)

    # ------------------------------------------------------------------------------------------------------- memory

    def bytes_at(self, low: int, high: int, size: int) -> np.ndarray:
        """Shared memory of a block of the running cluster, or global memory."""
        if high == SHARED_WINDOW:
            start, memory = low & 0xFFFFFF, self.blocks[low >> 24].shared
            allowed = SHARED_START <= start <= len(memory) - size
        else:
            start, memory = (high << 32 | low) - self.base, self.memory
            allowed = 0 <= start <= len(memory) - size and self.accessible[start : start + size].all()
        if not allowed or start % size:
            raise IndexError(f"{size} bytes at {high << 32 | low:#x} are outside the buffers or misaligned")
        return memory[start : start + size]


def compiled(machine: Machine, instruction: Instruction) -> Callable:
    """The function that executes an instruction: (warp, position, active lanes) -> next position, active lanes."""
    guard, execute = instruction.guard, build(machine, instruction)
    control = instruction.opcode in CONTROL
    negated, number = guard or (False, 7)
    bank = "uniform_predicates" if instruction.opcode[0] == "U" and instruction.opcode[:2] != "UC" else "predicates"

    def step(warp: Warp, position: int, active: np.ndarray) -> tuple[int | None, np.ndarray]:
        taken = active & (getattr(warp, bank)[number] ^ negated) if guard else active
        if control:
            return execute(warp, position, active, taken)
        if taken.any():
            execute(warp, position, taken)
        return position + 1, active

    return step
