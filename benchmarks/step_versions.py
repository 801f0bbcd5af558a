"""The training step of two checkouts, in turn: how much faster is this one?

    python -m benchmarks.step_versions ../before/.venv/bin/python ../before [--threads N --rounds N --cpu]

The other checkout, with its own Python in which its package is installed, serves the same provider "ours" of
benchmarks/step_ratios.py in a process of its own. In each round either process does one step while the other one waits,
so that other load on the machine affects both. A row has the medians and the median of the rounds' ratios. With --cpu
the time is that of the processor: of a single thread on a busy machine it says more.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

CASES = [(width, size) for width in (16, 32) for size in (128, 256)]
WARM_UP_ROUNDS = 2
WORKER = """
import sys, torch
torch.set_num_threads({threads})
from time import {clock} as clock
from benchmarks.step_ratios import Case, ours
with ours(Case({width}, {size}, 2, "cpu")) as step:
    for _ in sys.stdin:
        start = clock()
        step()
        print("seconds", clock() - start, flush=True)
"""


class Version:
    """A process that does a step of one checkout when it is asked."""

    def __init__(self, python: str, folder: Path, width: int, size: int, threads: int, clock: str) -> None:
        program = WORKER.format(threads=threads, width=width, size=size, clock=clock)
        self.process = subprocess.Popen(
            [python, "-c", program], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"{self.process.args[0]} ended with code {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="Python of the other checkout")
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    clock = "process_time" if arguments.cpu else "perf_counter"
    other = arguments.python, arguments.folder
    here = sys.executable, Path(__file__).resolve().parents[1]
    print("| step | other ms | this ms | other / this |\n| --- | --- | --- | --- |")
    for case in CASES:
        versions = [Version(*checkout, *case, arguments.threads, clock) for checkout in (other, here)]
        rounds = [[version.step() for version in versions] for _ in range(WARM_UP_ROUNDS + arguments.rounds)]
        for version in versions:
            version.close()
        rounds = rounds[WARM_UP_ROUNDS:]
        before, after = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        width, size = case
        print(f"| width {width}, 4 x {size} x {size} | {before:.4g} | {after:.4g} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
