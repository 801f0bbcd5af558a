"""Execute the machine code of a CUDA kernel on the CPU, one instruction at a time, and count the instructions.

`Program` reads the disassembly of sm_90 code, `run` executes a grid of clusters. An instruction counts once for each
warp that issues it, whatever the number of active lanes. Only what the kernels of csrc/ use is implemented; anything
else raises NotImplementedError. NVIDIA does not document the instructions, so the results must be checked: a wrong
guess shows in them. Floating-point estimates and sums may differ from the hardware in the last bit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LANES = 32
ALL = np.ones(LANES, bool)
SHARED_WINDOW = 0x7FFF0000  # the upper half of generic addresses of shared memory; the lower half has the rank in byte 3
SHARED_START = 0x400  # bytes that the system reserves
U32, S32, U64, F32 = np.uint32, np.int32, np.uint64, np.float32

Words = np.ndarray  # one per lane


@dataclass(frozen=True)
class Instruction:
    guard: tuple[bool, int] | None  # (negated, predicate)
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


class Program:
    """The instructions of one kernel, and the positions of its labels."""

    def __init__(self, disassembly: str, kernel: str) -> None:
        section = next(
            part for part in re.split(r"^\.text\.", disassembly, flags=re.M)[1:] if kernel in part.split(":")[0]
        )
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in section.splitlines()[1:]:
            if line.startswith("//----"):
                break
            if label := re.match(r"(\S+):$", line):
                self.labels[label[1]] = len(self.instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?)U?P(\w) )?([^;]*?)\s*;", line):
                negated, predicate, text = found.groups()
                opcode, _, operands = text.strip().partition(" ")
                guard = (bool(negated), 7 if predicate == "T" else int(predicate)) if predicate else None
                self.instructions.append(
                    Instruction(
                        guard,
                        *(lambda name, *modifiers: (name, modifiers))(*opcode.split(".")),
                        tuple(operand.strip().replace(".reuse", "") for operand in operands.split(",") if operand),
                        text,
                    )
                )


@dataclass
class Barrier:
    members: np.ndarray
    arrived: np.ndarray
    target: int


@dataclass
class Warp:
    block: Block
    first_thread: int
    registers: np.ndarray = field(default_factory=lambda: np.zeros((256, LANES), U32))
    uniform: np.ndarray = field(default_factory=lambda: np.zeros((64, LANES), U32))
    predicates: np.ndarray = field(default_factory=lambda: np.zeros((8, LANES), bool))
    uniform_predicates: np.ndarray = field(default_factory=lambda: np.zeros((8, LANES), bool))
    groups: list[tuple[int, np.ndarray]] = field(default_factory=lambda: [(0, ALL.copy())])  # position, active lanes
    barriers: dict[str, Barrier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.predicates[7] = self.uniform_predicates[7] = True
        self.vote = False
        self.waits_for: str | None = None


@dataclass
class Block:
    index: int
    rank: int
    shared: np.ndarray
    warps: list[Warp] = field(default_factory=list)
    votes: bool = False


class Machine:
    """Memory and state of the running cluster. Global memory begins at address `base`."""

    base = 0x1000

    def __init__(self, program: Program, constants: bytes, memory: np.ndarray) -> None:
        self.program, self.memory = program, memory
        self.constants = np.frombuffer(constants.ljust(0x1000, b"\0"), np.uint8)
        self.counts: Counter[int] = Counter()  # issues by position
        self.code: list[Callable | None] = [None] * len(program.instructions)  # compiled when first executed

    def run(self, clusters: int, blocks: int, threads: int, shared: int) -> None:
        for cluster in range(clusters):
            self.blocks = [
                Block(cluster * blocks + rank, rank, np.full(SHARED_START + shared, 0xA5, np.uint8))
                for rank in range(blocks)
            ]
            for block in self.blocks:
                block.warps = [Warp(block, first) for first in range(0, threads, LANES)]
            warps = [warp for block in self.blocks for warp in block.warps]
            while warps := [warp for warp in warps if warp.groups]:
                for warp in warps:
                    if warp.waits_for is None:
                        self.advance(warp)
                self.release(warps)

    def release(self, warps: list[Warp]) -> None:
        """Let warps continue for which a barrier is complete."""
        running = [warp for warp in warps if warp.groups]
        complete = bool(running) and all(warp.waits_for == "cluster" for warp in running)
        for block in self.blocks:
            here = [warp for warp in block.warps if warp.groups]
            if complete or (here and all(warp.waits_for == "block" for warp in here)):
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

    def bytes_at(self, warp: Warp, low: int, high: int | None) -> np.ndarray:
        """Memory from an address on: shared if high is None (of the own block) or the window, else global."""
        if high is None or high == SHARED_WINDOW:
            return self.blocks[low >> 24].shared[low & 0xFFFFFF :]
        address = high << 32 | low
        if not 0 <= address - self.base < len(self.memory):
            raise IndexError(f"address {address:#x} is outside the memory")
        return self.memory[address - self.base :]


# ---------------------------------------------------------------------------------------------------------- operands

Get = Callable[[Warp], Words]


def source(machine: Machine, text: str, *, floating: bool = False) -> Get:
    """The function that reads a 32-bit operand."""
    if text[0] in "-~|":
        inner = source(machine, text.strip("|") if text[0] == "|" else text[1:], floating=floating)
        if floating:
            sign = {"-": lambda x: x ^ U32(1 << 31), "|": lambda x: x & U32(0x7FFFFFFF)}[text[0]]
        else:
            sign = {"-": lambda x: (~x) + U32(1), "~": lambda x: ~x}[text[0]]
        if not re.match(r"-(0x|\d|\+?INF)", text):
            return lambda warp: sign(inner(warp))
    if text in ("RZ", "URZ", "SRZ"):
        zeros = np.zeros(LANES, U32)
        return lambda warp: zeros
    if found := re.fullmatch(r"(U?)R(\d+)", text):
        number = int(found[2])
        return (lambda warp: warp.uniform[number]) if found[1] else (lambda warp: warp.registers[number])
    if found := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
        offset = int(found[1], 16)
        value = int(machine.constants[offset : offset + 4].view(U32)[0])
    elif floating and not re.match(r"-?0x", text):
        value = int(np.array(float(text.replace("+INF", "inf")), F32).view(U32))
    else:
        value = int(text, 0) & 0xFFFFFFFF
    words = np.full(LANES, value, U32)
    return lambda warp: words


def pair(machine: Machine, text: str) -> Callable[[Warp], np.ndarray]:
    """The function that reads a 64-bit operand from a pair of registers."""
    lower = source(machine, text)
    if not re.fullmatch(r"U?R\d+", text):
        return lambda warp: lower(warp).astype(U64)
    upper = source(machine, re.sub(r"\d+", lambda number: str(int(number[0]) + 1), text))
    return lambda warp: lower(warp).astype(U64) | upper(warp).astype(U64) << U64(32)


def predicate(text: str) -> Callable[[Warp], np.ndarray]:
    """The function that reads a predicate operand."""
    found = re.fullmatch(r"(!?)(U?)P(\w)", text)
    negated, number = bool(found[1]), 7 if found[3] == "T" else int(found[3])
    bank = "uniform_predicates" if found[2] else "predicates"
    return lambda warp: getattr(warp, bank)[number] ^ negated


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[0-9T]", text) is not None


def write(warp: Warp, text: str, values: np.ndarray, active: np.ndarray) -> None:
    """Write 32-bit words, or 64-bit ones to a pair, or booleans to a predicate."""
    if text in ("RZ", "URZ", "PT", "UPT"):
        return
    kind, number = re.fullmatch(r"(U?[RP])(\d+)", text).groups()
    bank = {"R": warp.registers, "UR": warp.uniform, "P": warp.predicates, "UP": warp.uniform_predicates}[kind]
    if values.dtype == U64:
        np.copyto(bank[int(number) + 1], (values >> U64(32)).astype(U32), where=active)
        values = values.astype(U32)
    np.copyto(bank[int(number)], values, where=active, casting="unsafe")


def compiled(machine: Machine, instruction: Instruction) -> Callable:
    """The function that executes an instruction: (warp, position, active lanes) -> next position, active lanes."""
    from . import sass_instructions

    guard, execute = instruction.guard, sass_instructions.build(machine, instruction)
    control = instruction.opcode in sass_instructions.CONTROL
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
