"""What the instructions do: `build` returns the function that executes one. Memory and control are in this file."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import plain, signed, with_predicates
from .program import Instruction
from .state import LANES, S32, SHARED_WINDOW, U32, U64, Barrier, Warp, is_predicate, pair, predicate, source, write

if TYPE_CHECKING:
    from .machine import Machine

CONTROL = {"BRA", "BSSY", "BSYNC", "EXIT", "BAR", "UCGABAR_WAIT"}
IDLE = {"NOP", "WARPSYNC", "ENDCOLLECTIVE", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "UCGABAR_ARV"}


def build(machine: Machine, instruction: Instruction) -> Callable:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    operands = list(instruction.operands)
    if opcode in IDLE:
        return lambda warp, position, active: None
    if opcode in CONTROL:
        return control(machine, opcode, modifiers, operands)
    if opcode in ("LDG", "LD", "LDS", "LDC", "ULDC", "STG", "ST", "STS", "ATOM", "REDG", "ATOMS"):
        return access(machine, opcode, modifiers, operands)
    name = opcode.strip("U") if opcode.startswith("VOTE") else opcode.removeprefix("U")
    if name in ("LOP3", "PLOP3", "IADD3", "ISETP", "VOTE", "SHFL", "LEA", "R2P"):
        return with_predicates(machine, name, modifiers, operands)
    return plain(machine, name, modifiers, operands)


# -------------------------------------------------------------------------------------------------------------- memory


def access(machine: Machine, opcode: str, modifiers: tuple[str, ...], operands: list[str]) -> Callable:
    bits = next((int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128)", m)), 32)
    if opcode in ("LDC", "ULDC"):
        offset = int(re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", operands[1])[1], 16)
        number = int.from_bytes(machine.constants[offset : offset + bits // 8].tobytes(), "little")
        kind = U64 if bits == 64 else U32
        return lambda warp, position, active: write(warp, operands[0], np.full(LANES, number, kind), active)

    address = next(text for text in operands if "[" in text)
    base, uniform, constant = None, None, 0
    for term in re.split(r"\+", re.sub(r"^desc\[UR\d+\]", "", address).strip("[]")):
        if re.match(r"-?0x", term):
            constant += int(term, 0)
        elif term.startswith("UR"):
            uniform = source(machine.constants, term)
        else:
            base = term
    lower = source(machine.constants, base.removesuffix(".64") if base else "RZ")
    upper = pair(machine.constants, base.removesuffix(".64")) if base and base.endswith(".64") else None
    if upper is None and opcode not in ("LDS", "STS", "ATOMS"):
        raise NotImplementedError(f"{opcode} {address}")

    def places(warp: Warp, active: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The active lanes and the bytes that they access."""
        whole = (upper or lower)(warp).astype(U64) + U64(constant & 0xFFFFFFFFFFFFFFFF)
        if uniform is not None:
            whole = whole + uniform(warp)
        for lane in np.flatnonzero(active):
            low, high = int(whole[lane]) & 0xFFFFFFFF, int(whole[lane]) >> 32
            if upper is None:
                high = SHARED_WINDOW
                if low >> 24 != warp.block.rank:
                    raise IndexError(f"{opcode} reaches another block")
            yield lane, machine.bytes_at(low, high, bits // 8)

    if opcode in ("ATOM", "ATOMS", "REDG"):
        value, combine = source(machine.constants, operands[-1]), max if "MAX" in modifiers else operator.or_
        if not {"MAX", "OR"} & set(modifiers):
            raise NotImplementedError(opcode + "." + ".".join(modifiers))

        def atomic(warp: Warp, position: int, active: np.ndarray) -> None:
            words = signed(value(warp))
            for lane, memory in places(warp, active):
                here = memory.view(S32)
                here[0] = combine(here[0], words[lane])

        return atomic

    register = operands[0] if opcode.startswith("LD") else operands[-1]
    number = 255 if register == "RZ" else int(register[1:])
    count = max(bits // 32, 1)

    def load(warp: Warp, position: int, active: np.ndarray) -> None:
        kind = {8: np.uint8, 16: np.uint16}.get(bits, U32)
        for lane, memory in places(warp, active):
            warp.registers[number : number + count, lane] = memory.view(kind)

    def store(warp: Warp, position: int, active: np.ndarray) -> None:
        for lane, memory in places(warp, active):
            words = np.zeros(count, U32) if register == "RZ" else warp.registers[number : number + count, lane]
            memory[:] = np.ascontiguousarray(words).view(np.uint8)[: bits // 8]

    return load if opcode.startswith("LD") else store


# ------------------------------------------------------------------------------------------------------------- control


def control(machine: Machine, opcode: str, modifiers: tuple[str, ...], operands: list[str]) -> Callable:
    label = re.search(r"`\(([^)]*)\)", operands[-1] if operands else "")
    target = machine.program.labels.get(label[1]) if label else None

    def branch(warp: Warp, position: int, active: np.ndarray, taken: np.ndarray):
        if "DIV" in modifiers:  # taken if lanes are missing
            if not active.all():
                raise NotImplementedError("lanes are missing at a warp-wide instruction")
            return position + 1, active
        for text in operands[:-1]:
            if is_predicate(text):
                taken = taken & predicate(text)(warp)
        if not taken.any():
            return position + 1, active
        rest = active & ~taken
        if rest.any():
            warp.groups.append((position + 1, rest))
        return target, taken

    def open_barrier(warp: Warp, position: int, active: np.ndarray, taken: np.ndarray):
        warp.barriers[operands[0]] = Barrier(active.copy(), np.zeros(LANES, bool), target)
        return position + 1, active

    def close_barrier(warp: Warp, position: int, active: np.ndarray, taken: np.ndarray):
        machine.arrive(warp, operands[0], taken)
        rest = active & ~taken
        return (position + 1, rest) if rest.any() else (None, rest)

    def end(warp: Warp, position: int, active: np.ndarray, taken: np.ndarray):
        rest = active & ~taken
        for name, barrier in warp.barriers.items():
            barrier.members &= ~taken
            machine.complete(warp, name)
        return (position + 1, rest) if rest.any() else (None, rest)

    def wait(warp: Warp, position: int, active: np.ndarray, taken: np.ndarray):
        if not active.all():
            raise NotImplementedError("lanes are missing at a barrier")
        if "RED" in modifiers:
            warp.vote = bool(predicate(operands[-1])(warp).any())
        warp.waits_for = "block" if opcode == "BAR" else "cluster"
        return position + 1, active

    return {"BRA": branch, "BSSY": open_barrier, "BSYNC": close_barrier, "EXIT": end}.get(opcode, wait)
