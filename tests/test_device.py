"""Memory settings of a run on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from semimoe_fast.device import configure
configure(torch.device("cpu"), "fp32", False)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(4_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_freed_memory_is_used_again() -> None:
    """A tensor takes the pages of an earlier one, unless something is in the way: of the heap too, at random places."""

    def faults() -> tuple[int, int]:
        result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        first, least = map(int, result.stdout.split())
        return first, least

    measured = [faults() for _ in range(3)]
    assert all(first >= 8 for first, _ in measured)  # with pages of 2 MiB, and 3,906 with pages of 4 KiB
    assert any(least < first / 10 for first, least in measured)
