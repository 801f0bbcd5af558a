"""Programs that atheris (libFuzzer) guides by the branches of the readers, of Pillow's and of tifffile's Python code.

    python tests/abuse/fuzz_targets.py TARGET FOLDER [CORPUS] [libFuzzer options]
    python tests/abuse/fuzz_targets.py TARGET FOLDER CRASH         # repeats one input

TARGET is one of the functions below. FOLDER gets the input as a file and counts.json, the outcomes so far. A failure
is any exception but UserError, an error of several lines, or memory that has grown by 64 MiB after the first third of
-max_total_time.
"""

from __future__ import annotations

import json
import operator
import os
import sys
import time
from collections import Counter
from pathlib import Path

import atheris
import numpy as np
import torch  # noqa: F401  before the instrumented imports, which would instrument it too
from atheris.version_dependent import CMP_OP_SHIFT_AMOUNT

with atheris.instrument_imports(include=["semimoe_fast", "PIL", "tifffile"]):
    from PIL import Image

    from semimoe_fast import checkpoint
    from semimoe_fast.data.folders import read_image, read_instances, read_mask
    from semimoe_fast.data.readers import open_image
    from semimoe_fast.errors import UserError
    from semimoe_fast.inference.polygons import geojson
    from semimoe_fast.training import records
    from semimoe_fast.training.config import CONFIG_FILE, read_config

MOST_GROWTH = 2**26
PAGE = os.sysconf("SC_PAGE_SIZE")
COMPARISONS = operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge  # in the order of bytecode
TARGET, FOLDER = sys.argv[1], Path(sys.argv[2])
PATH = FOLDER / (CONFIG_FILE if TARGET == "config" else "input")


def checkpoints() -> None:
    loaded = checkpoint.load(PATH)
    checkpoint.Preprocessing.of(PATH, loaded.metadata)


def config() -> None:
    read_config(FOLDER).check()


def metrics() -> None:
    records.read(PATH)


def image() -> None:
    read_image(PATH)


def mask() -> None:
    read_mask(PATH)
    read_instances(PATH)


def region() -> None:
    with open_image(PATH) as reader:
        height, width = reader.size
        reader.read(height // 2, width // 2, min(64, height - height // 2), min(64, width - width // 2))


def polygons() -> None:
    """Two bytes of size, one of dtype, then the labels."""
    height, width, kind, *data = PATH.read_bytes().ljust(3, b"\0")
    labels = np.zeros((height % 32, width % 32), (np.uint8, np.uint16, np.int32, bool)[kind % 4])
    labels.flat[: len(data)] = data[: labels.size]
    assert json.loads(geojson(labels, "name"))["type"] == "FeatureCollection"


def free_results_of_comparisons() -> None:
    """Do the comparisons of instrumented code that atheris does not report to libFuzzer, such as those of arrays.

    atheris 3.0.0 does them too, and never frees their results. Call this while it fuzzes: Fuzz() sets its function.
    """
    trace = atheris._trace_cmp
    reported = int, bytes, str

    def compare(left: object, right: object, number: int, *place: int) -> object:
        if isinstance(left, reported) and isinstance(right, reported):
            return trace(left, right, number, *place)
        return COMPARISONS[number >> CMP_OP_SHIFT_AMOUNT](left, right)

    atheris._trace_cmp = compare


class Watch:
    """One call of the target for each input, counted by outcome."""

    def __init__(self, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self.warm, self.memory = time.monotonic() + seconds / 3, 0
        self.call = globals()[TARGET]
        self.write(0.0)

    def __call__(self, data: bytes) -> None:
        if not self.counts:
            free_results_of_comparisons()
        PATH.write_bytes(data)
        try:
            self.call()
            self.counts["worked"] += 1
        except UserError as error:
            if "\n" in str(error):
                raise
            self.counts["one line"] += 1
        if (now := time.monotonic()) > self.written + 1:
            self.write(now)
            self.check_memory(now)

    def write(self, now: float) -> None:
        self.written = now
        (FOLDER / "counts.json").write_text(json.dumps(self.counts))

    def check_memory(self, now: float) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        if now > self.warm:
            self.memory = self.memory or resident
            assert resident < self.memory + MOST_GROWTH, f"memory grew from {self.memory:,} to {resident:,} bytes"


def main() -> None:
    options = sys.argv[3:]
    seconds = [float(option.partition("=")[2]) for option in options if option.startswith("-max_total_time=")]
    Image.MAX_IMAGE_PIXELS = 2**20  # larger images are slow, and are bombs of test_images.py
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  not the readers' warnings; libFuzzer has its own
    atheris.Setup([sys.argv[0], *options], Watch(*seconds or [0.0]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
