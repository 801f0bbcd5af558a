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
    torch.empty(20_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_freed_memory_is_used_again() -> None:
    """The second tensor takes the pages of the first one, so that the system need not clear new ones."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, second = map(int, result.stdout.split())
    assert first > 30  # with pages of 4 KiB 20,000; of 2 MiB 39
    assert second < first / 10
