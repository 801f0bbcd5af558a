"""What the tests of cached images have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from semimoe_fast.data import folders
from semimoe_fast.data.folders import Dataset


def assert_same(dataset: Dataset, expected: Dataset) -> None:
    assert torch.equal(dataset.images, expected.images)
    assert dataset.images.dtype == torch.uint8
    assert (dataset.masks is None) == (expected.masks is None)
    assert dataset.masks is None or torch.equal(dataset.masks, expected.masks)
    assert dataset.names == expected.names
    assert dataset.fingerprint == expected.fingerprint


def fail_if_decoding(patch: pytest.MonkeyPatch) -> None:
    for name in ("read_image", "read_mask"):
        patch.setattr(folders, name, lambda path: pytest.fail(f"{path} is decoded again"))


def flip(position: int) -> Callable[[Path], None]:
    """A function that flips the lowest bit of the byte at a position of a file."""

    def flip_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return flip_bit
