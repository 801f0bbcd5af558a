"""List the commands: `python -m semimoe_fast`."""

from __future__ import annotations

import sys

COMMANDS = {
    "train": "train on labeled and unlabeled images, or on synthetic glands",
    "evaluate": "score a checkpoint, or a folder of predictions",
    "predict": "segment images of any size",
    "export": "write a checkpoint as a pt2 or an ONNX file",
    "prepare": "lay out GlaS or CRAG for training",
    "synthetic": "write synthetic glands in the same layout",
    "info": "print versions, the build and the backends",
}


def main(arguments: list[str]) -> int:
    """Print the commands; the exit status is 2 if there are arguments, which belong to a command."""
    if arguments:
        print(f"error: write python -m semimoe_fast.COMMAND, one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    print("python -m semimoe_fast.COMMAND --help lists the options of a command:\n")
    for name, text in COMMANDS.items():
        print(f"  {name:<11}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
