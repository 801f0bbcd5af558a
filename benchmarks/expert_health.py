"""At which learning rate do the experts of a recipe die? Short runs by width, seed and learning rate.

    python -m benchmarks.expert_health --data GlaS256 --out benchmarks/results/health.json

Every run has a warm-up of --warm-up epochs and 6 epochs after it. A row has the share of dead feature channels of each
expert at the end, and the first epoch, from 1, after which half of the channels of the sdf expert were dead.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from semimoe_fast import train
from semimoe_fast.options import read_options
from semimoe_fast.training import records
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.run_folder import METRICS_FILE

from .record import commit, machine, short, write_record

AFTER = 6
HALF = 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """Health of the experts by width, seed and learning rate."""

    data: Path
    """Folder as of `train --data`."""
    out: Path
    """JSON file to write."""
    widths: tuple[int, ...] = (8, 16)
    seeds: tuple[int, ...] = (0, 1)
    lrs: tuple[float, ...] = (0.5, 0.1)
    """0.015 is that of --recipe strong."""
    image_size: int = 64
    warm_up: int = 10
    """Epochs."""
    recipe: Literal["published", "strong"] = "published"
    """Of `train`, but for the learning rate."""


def main() -> None:
    options = read_options(Options, "benchmarks.expert_health")
    code = short(commit())  # of what runs now
    rows = []
    for width, seed, lr in tqdm([*itertools.product(options.widths, options.seeds, options.lrs)], "runs"):
        recipe = RECIPES[options.recipe] | {"lr": lr}
        epochs = options.warm_up + AFTER
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            train.main(
                TrainConfig(
                    data=options.data, width=width, image_size=options.image_size, seed=seed, epochs=epochs,
                    warmup_epochs=options.warm_up, save_every=epochs, threads=1, device="cpu", out=out, **recipe,
                )
            )  # fmt: skip
            kept = records.read(out / METRICS_FILE)
        dying = [(r["epoch"] + 1, round(r["lr"], 4)) for r in kept if r["health"]["dead_channels"][1] >= HALF]
        rows.append([width, seed, lr, *kept[-1]["health"]["dead_channels"], *(dying[0] if dying else (None, None))])
    columns = ["width", "seed", "--lr", "mask", "sdf", "boundary", "sdf half dead in epoch", "its learning rate"]
    write_record(
        options.out,
        machine(1),
        code,
        [
            f"python -m benchmarks.expert_health --data GlaS256 --out FILE --image-size {options.image_size} "
            f"--warm-up {options.warm_up} --recipe {options.recipe} --widths {' '.join(map(str, options.widths))} "
            f"--seeds {' '.join(map(str, options.seeds))} --lrs {' '.join(map(str, options.lrs))}"
        ],
        {"dead": {"columns": columns, "rows": rows}},
    )


if __name__ == "__main__":
    main()
