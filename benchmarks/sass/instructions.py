"""What the instructions do: `build` returns the function that executes one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .program import Instruction
from .state import (
    F32,
    LANES,
    S32,
    SHARED_WINDOW,
    U32,
    U64,
    Barrier,
    Warp,
    is_predicate,
    pair,
    predicate,
    source,
    write,
)

if TYPE_CHECKING:
    from .machine import Machine

CONTROL = {"BRA", "BSSY", "BSYNC", "EXIT", "BAR", "UCGABAR_WAIT"}
IDLE = {"NOP", "WARPSYNC", "ENDCOLLECTIVE", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "UCGABAR_ARV", "DEPBAR", "FENCE"}
COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
JOIN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def signed(words: np.ndarray) -> np.ndarray:
    return words.view(S32)


def floats(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(F32)


def lut3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    result = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return result


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
    if name in ("LOP3", "PLOP3", "IADD3", "ISETP", "FSETP", "VOTE", "SHFL", "LEA", "R2P", "FCHK"):
        return with_predicates(machine, name, modifiers, operands)
    return plain(machine, name, modifiers, operands)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def plain(machine: Machine, name: str, modifiers: tuple[str, ...], operands: list[str]) -> Callable:
    """Instructions that write one register, or a pair."""
    target, *rest = operands
    floating = name in ("FMUL", "FADD", "FFMA", "FSEL", "MUFU")
    negated = [text for text in rest if is_predicate(text)]
    values = [
        source(machine.constants, text, floating=floating)
        for text in rest
        if not is_predicate(text) and text[:3] != "SR_" and text != "PR"
    ]
    test = predicate(negated[-1]) if negated else None
    unsigned = "U32" in modifiers
    view = (lambda words: words) if unsigned else signed

    def least(warp: Warp, *words: np.ndarray) -> np.ndarray:
        """Minimum where the predicate holds, else maximum."""
        if "U16x2" in modifiers:
            halves = [np.ascontiguousarray(word).view(np.uint16) for word in words]
            return np.where(np.repeat(test(warp), 2), np.minimum.reduce(halves), np.maximum.reduce(halves)).view(U32)
        viewed = [view(word) for word in words]
        result = np.where(test(warp), np.minimum.reduce(viewed), np.maximum.reduce(viewed))
        return (np.maximum(result, 0) if "RELU" in modifiers else result).view(U32)

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if "U16x2" in modifiers:
            return (np.ascontiguousarray(a).view(np.uint16) + np.ascontiguousarray(b).view(np.uint16)).view(U32)
        return a + b

    def shift(a: np.ndarray, count: np.ndarray, upper: np.ndarray) -> np.ndarray:
        count = (count & U32(31) if "W" in modifiers else np.minimum(count, U32(63))).astype(U64)
        if "R" in modifiers and "S32" in modifiers:
            return (signed(upper).astype(np.int64) >> count.astype(np.int64)).astype(S32).view(U32)
        if "R" in modifiers and "HI" in modifiers:
            return (upper.astype(U64) >> count).astype(U32)
        if "L" in modifiers:
            whole = (upper.astype(U64) << U64(32) | a.astype(U64)) << count
            return (whole >> U64(32) if "HI" in modifiers else whole & U64(0xFFFFFFFF)).astype(U32)
        raise NotImplementedError(f"SHF.{'.'.join(modifiers)}")

    def permute(a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> np.ndarray:
        whole, result = b.astype(U64) << U64(32) | a.astype(U64), np.zeros(LANES, U32)
        for byte in range(4):
            nibble = (selector >> U32(4 * byte)).astype(U64)
            value = (whole >> (U64(8) * (nibble & U64(7)))).astype(U32) & U32(0xFF)
            sign = np.where(value & U32(0x80), U32(0xFF), U32(0))
            result |= np.where(nibble & U64(8), sign, value).astype(U32) << U32(8 * byte)
        return result

    def wide(warp: Warp) -> np.ndarray:
        """Product of the first two operands plus the 64-bit third one."""
        a, b = values[0](warp), values[1](warp)
        product = a.astype(U64) * b.astype(U64)
        if not unsigned:
            product = (signed(a).astype(np.int64) * signed(b).astype(np.int64)).view(U64)
        return product + pair(machine.constants, rest[2])(warp)

    def highest(words: np.ndarray) -> np.ndarray:
        position = np.frexp(words.astype(np.float64))[1].astype(S32) - 1
        return np.where(words == 0, -1, 31 - position if "SH" in modifiers else position).astype(S32).view(U32)

    def reverse(words: np.ndarray) -> np.ndarray:
        return (
            np.packbits(np.unpackbits(words.view(np.uint8).reshape(-1, 4)[:, ::-1], axis=1)[:, ::-1], axis=1)[:, ::-1]
            .copy()
            .view(U32)
            .ravel()
        )

    def integer(warp: Warp) -> np.ndarray:
        words = [value(warp) for value in values]
        match name:
            case "MOV" | "CS2R" | "R2UR":
                return words[0].astype(U64) if name == "CS2R" and "32" not in modifiers else words[0]
            case "IMAD" if "WIDE" in modifiers:
                return wide(warp)
            case "IMAD" if "HI" in modifiers:
                return (wide(warp) >> U64(32)).astype(U32)
            case "IMAD":
                carry = test(warp).astype(U32) if "X" in modifiers else U32(0)
                return words[0] * words[1] + words[2] + carry
            case "VIADD":
                return words[0] + words[1]
            case "VIADDMNMX":
                return least(warp, add(words[0], words[1]), words[2])
            case "VIMNMX" | "VIMNMX3" | "IMNMX":
                return least(warp, *words)
            case "SEL" | "FSEL":
                return np.where(test(warp), words[0], words[1])
            case "SHF":
                return shift(*words)
            case "PRMT":
                return permute(*words)
            case "FLO":
                return highest(words[0])
            case "BREV":
                return reverse(words[0])
            case "POPC":
                return np.bitwise_count(words[0]).astype(U32)
            case "IABS":
                return np.abs(signed(words[0])).view(U32)
            case "P2R":
                byte = int(modifiers[0][1]) if modifiers else 0
                bits = sum(warp.predicates[i].astype(U32) << U32(i) for i in range(7))
                mask = int(rest[2], 0)
                return (words[0] & U32(~(mask << 8 * byte) & 0xFFFFFFFF)) | (bits & U32(mask)) << U32(8 * byte)
        raise NotImplementedError(name + "." + ".".join(modifiers))

    def real(warp: Warp) -> np.ndarray:
        numbers = [floats(value(warp)).astype(np.float64) for value in values]
        with np.errstate(all="ignore"):
            match name:
                case "FMUL":
                    result = numbers[0] * numbers[1]
                case "FADD":
                    result = numbers[0] + numbers[1]
                case "FFMA":
                    result = numbers[0] * numbers[1] + numbers[2]
                case "MUFU":
                    result = 1 / (numbers[0] if "RCP" in modifiers else np.sqrt(numbers[0]))
            return result.astype(F32).view(U32)

    def convert(warp: Warp) -> np.ndarray:
        words = values[0](warp)
        if name == "F2I":
            return np.trunc(floats(words)).astype(U32)
        if name == "I2FP":
            return signed(words).astype(F32).view(U32)
        exact = words.astype(np.float64)  # I2F.RP rounds up
        rounded = exact.astype(F32)
        return np.where(rounded < exact, np.nextafter(rounded, F32(np.inf)), rounded).astype(F32).view(U32)

    def special(warp: Warp) -> np.ndarray:
        thread = np.arange(LANES, dtype=U32) + U32(warp.first_thread)
        known = {
            "SR_TID.X": thread,
            "SR_CTAID.X": np.full(LANES, warp.block.index, U32),
            "SR_CgaCtaId": np.full(LANES, warp.block.rank, U32),
            "SR_SWINHI": np.full(LANES, SHARED_WINDOW, U32),
            "SR_LANEID": thread % U32(LANES),
        }
        return known[rest[0]]

    def reduced(warp: Warp, position: int, active: np.ndarray) -> None:
        words = values[0](warp)[active]
        result = np.bitwise_or.reduce(words) if modifiers == ("OR",) else view(words).max()
        write(warp, target, np.full(LANES, result).astype(U32), np.ones(LANES, bool))

    if name == "REDUX" and modifiers[0] in ("OR", "MAX"):
        return reduced
    if name in ("S2R", "S2UR"):
        read = special
    elif name in ("I2FP", "I2F", "F2I"):
        read = convert
    elif floating and name != "FSEL":
        read = real
    elif name == "B2R":
        return lambda warp, position, active: write(warp, rest[0], np.full(LANES, warp.block.votes), active)
    else:
        read = integer
    return lambda warp, position, active: write(warp, target, read(warp), active)


# ---------------------------------------------------------------------------------------------------------- predicates


def with_predicates(machine: Machine, name: str, modifiers: tuple[str, ...], operands: list[str]) -> Callable:
    """Instructions that write predicates, or read some as carries."""
    targets = []  # predicates that the instruction writes: those before the first register, and, of PLOP3, two
    while is_predicate(operands[0]) and (name not in ("PLOP3",) or len(targets) < 2):
        targets.append(operands.pop(0))
        if (name in ("ISETP", "FSETP") and len(targets) == 2) or name == "VOTE":
            break
    has_register = re.fullmatch(r"U?R(\d+|Z)", operands[0]) and name not in ("ISETP", "FSETP", "R2P", "FCHK")
    register = operands.pop(0) if has_register else "RZ"
    while (
        name in ("IADD3", "LEA", "VOTE")
        and operands
        and is_predicate(operands[0])
        and (name != "VOTE" or len(operands) > 1)
    ):
        targets.append(operands.pop(0))
    tests = [predicate(text) for text in operands if is_predicate(text)]
    texts = [text for text in operands if not is_predicate(text) and text != "PR"]
    values = [source(machine.constants, text, floating=name in ("FSETP", "FCHK")) for text in texts]

    def execute(warp: Warp, position: int, active: np.ndarray) -> None:
        words = [value(warp) for value in values]
        flags = [test(warp) for test in tests]
        if name == "LOP3":
            result = lut3(*words[:3], int(texts[3], 0))
            write(warp, register, result, active)
            for target in targets:
                write(warp, target, result != 0, active)
        elif name == "PLOP3":
            for target, text in zip(targets, texts, strict=False):
                bits = lut3(*(flag.astype(U32) * U32(0xFFFFFFFF) for flag in flags[:3]), int(text, 0))
                write(warp, target, bits != 0, active)
        elif name == "IADD3":
            carries = sum(flag.astype(U64) for flag in flags) if "X" in modifiers else U64(0)
            total = sum(word.astype(U64) for word in words) + carries
            # A negated operand is its complement plus one; that of 0 carries.
            total = total + sum(
                (word == 0).astype(U64) << U64(32) for word, text in zip(words, texts, strict=True) if text[0] == "-"
            )
            write(warp, register, total.astype(U32), active)
            for target in targets:
                write(warp, target, total >> U64(32) != 0, active)
        elif name == "LEA":
            count = U64(int(texts[-1], 0))
            carry = flags[-1].astype(U64) if "X" in modifiers else U64(0)
            if "SX32" in modifiers:
                upper = np.where(words[0] >> U32(31), U32(0xFFFFFFFF), U32(0))
            else:
                upper = words[2] if "HI" in modifiers else np.zeros(LANES, U32)
            scaled = (upper.astype(U64) << U64(32) | words[0].astype(U64)) << count
            part = scaled >> U64(32) if "HI" in modifiers else scaled & U64(0xFFFFFFFF)
            total = part + words[1].astype(U64) + carry
            write(warp, register, total.astype(U32), active)
            for target in targets:
                write(warp, target, total >> U64(32) != 0, active)
        elif name in ("ISETP", "FSETP"):
            compare = COMPARE.get(modifiers[0])
            if name == "FSETP":
                a, b = (floats(word) for word in words)
                compare = COMPARE[modifiers[0].rstrip("U")] if len(modifiers[0]) == 3 else compare
            else:
                a, b = words if "U32" in modifiers else (signed(word) for word in words)
            result = compare(a, b)
            if "EX" in modifiers:
                low = flags.pop()
                same = {"EQ": a == b, "NE": a == b}.get(modifiers[0], a == b)
                strict = {"LE": np.less, "GE": np.greater}.get(modifiers[0], compare)(a, b)
                result = (same & low) if modifiers[0] == "EQ" else strict | (same & low)
            joined = next(JOIN[m] for m in modifiers if m in JOIN)
            write(warp, targets[0], joined(result, flags[-1]), active)
            write(warp, targets[1], joined(~result, flags[-1]), active)
        elif name == "VOTE":
            ballot = sum(int(flag) << lane for lane, flag in enumerate(flags[-1] & active))
            write(warp, register, np.full(LANES, ballot, U32), active)
            for target in targets:
                write(warp, target, np.full(LANES, ballot != 0), active)
        elif name == "SHFL" and modifiers == ("BFLY",):
            lanes = (np.arange(LANES) ^ int(texts[1], 0)) % LANES
            write(warp, register, words[0][lanes], active)
        elif name == "R2P":
            for bit in range(7):
                if int(texts[1], 0) >> bit & 1:
                    write(warp, f"P{bit}", (words[0] >> U32(bit) & U32(1)).astype(bool), active)
        elif name == "FCHK":  # whether a division needs its slow path
            write(warp, targets[0], np.zeros(LANES, bool), active)
        else:
            raise NotImplementedError(name + "." + ".".join(modifiers))

    return execute


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

    def places(warp: Warp, active: np.ndarray):
        whole = (upper or lower)(warp).astype(U64) + U64(constant & 0xFFFFFFFFFFFFFFFF)
        if uniform is not None:
            whole = whole + uniform(warp)
        for lane in np.flatnonzero(active):
            value = int(whole[lane])
            if upper is None:
                value &= 0xFFFFFFFF
                if value >> 24 != warp.block.rank:
                    raise IndexError(f"{opcode} reaches another block")
                yield lane, machine.bytes_at(warp, value, None)
            else:
                yield lane, machine.bytes_at(warp, value & 0xFFFFFFFF, value >> 32)

    if opcode in ("ATOM", "ATOMS", "REDG"):
        value, combine = source(machine.constants, operands[-1]), max if "MAX" in modifiers else operator.or_
        if not {"MAX", "OR"} & set(modifiers):
            raise NotImplementedError(opcode + "." + ".".join(modifiers))

        def atomic(warp: Warp, position: int, active: np.ndarray) -> None:
            words = signed(value(warp))
            for lane, memory in places(warp, active):
                here = memory[:4].view(S32)
                here[0] = combine(here[0], words[lane])

        return atomic

    register = operands[0] if opcode.startswith("LD") else operands[-1]
    number = 255 if register == "RZ" else int(register[1:])
    count = max(bits // 32, 1)

    def load(warp: Warp, position: int, active: np.ndarray) -> None:
        kind = {8: np.uint8, 16: np.uint16}.get(bits, U32)
        for lane, memory in places(warp, active):
            size = min(bits, 32) // 8
            warp.registers[number : number + count, lane] = memory[: count * size].view(kind)

    def store(warp: Warp, position: int, active: np.ndarray) -> None:
        for lane, memory in places(warp, active):
            words = np.zeros(count, U32) if register == "RZ" else warp.registers[number : number + count, lane]
            memory[: bits // 8] = np.ascontiguousarray(words).view(np.uint8)[: bits // 8]

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
