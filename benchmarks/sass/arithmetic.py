"""Instructions that compute registers and predicates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .state import F32, LANES, S32, SHARED_WINDOW, U32, U64, Warp, is_predicate, pair, predicate, source, write

if TYPE_CHECKING:
    from .machine import Machine

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
        if (name == "ISETP" and len(targets) == 2) or name == "VOTE":
            break
    has_register = re.fullmatch(r"U?R(\d+|Z)", operands[0]) and name not in ("ISETP", "R2P")
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
    values = [source(machine.constants, text) for text in texts]

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
        elif name == "ISETP":
            compare = COMPARE[modifiers[0]]
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
        else:
            raise NotImplementedError(name + "." + ".".join(modifiers))

    return execute
