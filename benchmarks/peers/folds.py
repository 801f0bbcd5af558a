"""Folds within the labeled images: `python -m benchmarks.peers.folds --data GlaS256 --out folds`.

Every fold is a data folder for `python -m benchmarks.peers`: its val has a share of the labeled images, its train_sup_N
the others, and its unlabeled images are all of the data set. The val of the data set is in none. Files are links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from semimoe_fast.data.folders import Pair, list_pairs
from semimoe_fast.errors import UserError, run_command
from semimoe_fast.options import read_options, require_empty
from semimoe_fast.training.sources import only_part


@dataclasses.dataclass(frozen=True)
class Options:
    """Lay out the folds of a cross-validation within the labeled images of a data folder."""

    data: Path
    """Folder with one train_sup_* and one train_unsup_*."""
    out: Path
    """New folder of the folds fold0, fold1, ..."""
    folds: int = 4
    """Number of folds."""
    seed: int = 0
    """Seed of the order in which the images are dealt out."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(Options, "benchmarks.peers.folds", arguments)
    require_empty(options.out)
    labeled = list_pairs(options.data, only_part(options.data, "train_sup_", "--labeled"), with_masks=True)
    unlabeled_part = only_part(options.data, "train_unsup_", "--unlabeled")
    unlabeled = list_pairs(options.data, unlabeled_part, (options.data / unlabeled_part / "mask").is_dir())
    if not 2 <= options.folds <= len(labeled):
        raise UserError(f"--folds is {options.folds}: give 2 to {len(labeled)}, the number of labeled images")
    order = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(options.seed)).tolist()
    for number in range(options.folds):
        held_out = order[number :: options.folds]
        kept = [pair for index, pair in enumerate(labeled) if index not in held_out]
        fold = options.out / f"fold{number}"
        link(kept, fold / f"train_sup_{len(kept)}")
        link(unlabeled, fold / unlabeled_part)
        link([labeled[index] for index in held_out], fold / "val")
        print(f"{fold}: {len(kept)} labeled, {len(unlabeled)} unlabeled, {len(held_out)} to validate")


def link(pairs: Sequence[Pair], part: Path) -> None:
    """Link the files of images, and of masks if there are any, into part/image and part/mask."""
    for kind, paths in zip(("image", "mask"), zip(*pairs, strict=True), strict=True):
        for path in filter(None, paths):
            (part / kind).mkdir(parents=True, exist_ok=True)
            (part / kind / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    run_command(main)
