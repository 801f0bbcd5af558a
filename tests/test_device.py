"""The choice of the device, and memory settings of a run on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from semimoe_fast import info
from semimoe_fast.device import choose_device
from semimoe_fast.errors import UserError

PROGRAM = """
import resource, torch
from semimoe_fast.device import configure
configure(torch.device("cpu"), "fp32", False)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(10_000_000).fill_(1)  # above 32 MiB, where glibc's own settings never keep memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), min(faults() for _ in range(30)))
"""


def test_gpus_of_a_driver_that_is_too_old_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts them, because NVML does, but cannot use them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ("GPU", "none") in info.versions()
    with pytest.raises(UserError, match="--device is 'cuda', but torch can use 0 CUDA devices; use --device cpu"):
        choose_device("cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_freed_memory_is_used_again() -> None:
    """A tensor takes the pages of earlier ones, at the latest after a few that small allocations keep apart."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, least = map(int, result.stdout.split())
    assert first >= 8  # with pages of 2 MiB, and 9,766 with pages of 4 KiB
    assert least < first / 10
