"""The instructions of a kernel, from its disassembly."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
