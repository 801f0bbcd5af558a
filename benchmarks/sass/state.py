"""Registers and shared memory of the running threads, and how the operands of instructions read and write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LANES = 32
SHARED_WINDOW = 0x7FFF0000  # upper half of generic addresses of shared memory; byte 3 of the lower half is the rank
SHARED_START = 0x400  # the system reserves the bytes before
U32, S32, U64, F32 = np.uint32, np.int32, np.uint64, np.float32

Words = np.ndarray  # one per lane


@dataclass
class Barrier:
    """A place where diverged lanes meet again."""

    members: np.ndarray
    arrived: np.ndarray
    target: int


@dataclass
class Warp:
    """Registers are words of all lanes; predicate 7 is always true."""

    block: Block
    first_thread: int
    registers: np.ndarray = field(default_factory=lambda: np.zeros((256, LANES), U32))
    uniform: np.ndarray = field(default_factory=lambda: np.zeros((64, LANES), U32))
    predicates: np.ndarray = field(default_factory=lambda: np.zeros((8, LANES), bool))
    uniform_predicates: np.ndarray = field(default_factory=lambda: np.zeros((8, LANES), bool))
    # Position and active lanes of each group that can run.
    groups: list[tuple[int, np.ndarray]] = field(default_factory=lambda: [(0, np.ones(LANES, bool))])
    barriers: dict[str, Barrier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.predicates[7] = self.uniform_predicates[7] = True
        self.vote = False  # for the barrier that the warp waits at
        self.waits_for: str | None = None  # block or cluster


@dataclass
class Block:
    index: int
    rank: int  # in its cluster
    shared: np.ndarray
    warps: list[Warp] = field(default_factory=list)
    votes: bool = False  # whether a warp voted for the condition of the last barrier


Get = Callable[[Warp], Words]


def source(constants: np.ndarray, text: str, *, floating: bool = False) -> Get:
    """The function that reads a 32-bit operand."""
    if text[0] in "-~|":
        inner = source(constants, text.strip("|") if text[0] == "|" else text[1:], floating=floating)
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
        value = int(constants[offset : offset + 4].view(U32)[0])
    elif floating and not re.match(r"-?0x", text):
        value = int(np.array(float(text.replace("+INF", "inf")), F32).view(U32))
    else:
        value = int(text, 0) & 0xFFFFFFFF
    words = np.full(LANES, value, U32)
    return lambda warp: words


def pair(constants: np.ndarray, text: str) -> Callable[[Warp], np.ndarray]:
    """The function that reads a 64-bit operand from a pair of registers."""
    lower = source(constants, text)
    if not re.fullmatch(r"U?R\d+", text):
        return lambda warp: lower(warp).astype(U64)
    upper = source(constants, re.sub(r"\d+", lambda number: str(int(number[0]) + 1), text))
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
