"""The layout of a data folder: its parts, and what a message says of another layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

UNPACKED = {"GlaS": "train_*_anno.bmp", "CRAG": "train/Images"}  # what data sets have before `prepare` lays them out
MOST_LISTED = 4  # names in a message
LAYOUT = "train_sup_N/{image,mask}, train_unsup_M/image and val/{image,mask}"


def part_folder(root: Path, part: str, kind: str) -> Path:
    """ROOT/PART/KIND. If it is missing, a UserError says what is there instead."""
    folder = root / part / kind
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: correct the path of the data")
    if folder.is_dir():
        return folder
    parts = sorted(path.parent.name for path in root.glob(f"*/{kind}") if path.is_dir())
    if folder.parent.is_dir():
        found = sorted(path.name for path in folder.parent.iterdir())
        others = f" ({listed(parts)})" if parts else ""
        remedy = (
            f"{folder.parent} has {listed(found) or 'nothing'}; add or rename a folder, or choose another part{others}"
        )
    elif (root / kind).is_dir():
        remedy = f"{root} is a part itself; give the folder above it"
    elif parts:
        remedy = f"{root} has the parts {listed(parts)}; add it, or choose another part"
    elif any(next(root.glob(below + sign), None) for sign in UNPACKED.values() for below in ("", "*/")):
        remedy = f"{root} has no part; lay it out with `python -m semimoe_fast.prepare`"
    else:
        remedy = f"{root} has no part; it needs {LAYOUT}"
    raise UserError(f"{folder} is missing: {remedy}")


def listed(names: Sequence[str]) -> str:
    """The first names, separated by commas."""
    return ", ".join([*names[:MOST_LISTED], *(["..."] if len(names) > MOST_LISTED else [])])
