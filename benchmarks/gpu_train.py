"""Train ten epochs of the published recipe on synthetic glands, and measure speed and memory.

    python -m benchmarks.gpu_train RUN FOLDER RESULT

RUN: one of `RUNS`, which are several ways to train. FOLDER: the images; it is created if it does not exist, and the run
folders are beside it. RESULT: a JSON file to write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from semimoe_fast import train
from semimoe_fast.synthetic import Folder, write
from semimoe_fast.training import run_folder
from semimoe_fast.training.config import TrainConfig

RECIPE = TrainConfig(epochs=10, save_every=10)  # a checkpoint has 0.8 GB, and writing it may take longer than an epoch
RUNS: dict[str, dict[str, Any]] = {
    "graph": {},
    "eager": {"cuda_graph": False},
    "profile": {"profile": True, "epochs": 1},
    "compiled": {"compile": "default"},
}


def measure(run: str, folder: Path, recipe: TrainConfig = RECIPE) -> dict[str, Any]:
    """Train one run and return its results. Speeds are medians over the epochs after the first."""
    out = folder.parent / "runs" / run
    shutil.rmtree(out, ignore_errors=True)
    config = dataclasses.replace(recipe, data=folder, out=out, **RUNS[run])
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(config)
    seconds = time.perf_counter() - start
    records = [json.loads(line) for line in (out / run_folder.METRICS_FILE).read_text().splitlines()]
    speeds = [record["speed"] for record in records]
    return {
        name: statistics.median(speed[name] for speed in speeds[1:] or speeds)
        for name in ("images_per_second", "tflop_per_second", "peak_memory_bytes", "warm_up_seconds")
    } | {
        "seconds": seconds,
        "epochs": len(records),
        "loss": [record["total"] for record in records],
        "dice": [record["val"]["gated"]["dice"] for record in records if "val" in record],
        "printed": printed.getvalue(),
    }


def main() -> None:
    run, folder, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(Folder(part, labeled=17, unlabeled=68, val=10, size=256))  # the numbers of GlaS
        part.rename(folder)
    result.write_text(json.dumps(measure(run, folder)))


if __name__ == "__main__":
    main()
