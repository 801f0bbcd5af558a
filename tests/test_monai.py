"""`semimoe_fast.monai`: the distance targets as a dictionary transform."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

from semimoe_fast import functional as F
from semimoe_fast.data.glands import glands


@pytest.fixture(scope="module")
def transforms():
    pytest.importorskip("monai", reason="needs MONAI: pip install 'semimoe_fast[monai]'")
    return importlib.import_module("semimoe_fast.monai")


def test_targets_of_one_image_and_of_a_batch(transforms) -> None:
    """In a Compose before the DataLoader, or on the batches after it: the same targets, those of functional."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped

    _, masks = glands(4, 32, seed=0)
    items = [{"mask": mask.numpy()} for mask in masks]
    load = [EnsureChannelFirstd("mask", channel_dim="no_channel"), EnsureTyped("mask", dtype=torch.float32)]
    transform = transforms.SignedDistanced("mask", ring_radius=1)
    (early,) = DataLoader(Dataset(items, Compose([*load, transform])), batch_size=4)
    (batch,) = DataLoader(Dataset(items, Compose(load)), batch_size=4)
    late = transform(batch)
    sdf, boundary = F.distance_targets(masks[:, None], ring_radius=1)
    for result in (early, late):
        torch.testing.assert_close(result["mask_sdf"], sdf, rtol=0, atol=0)
        torch.testing.assert_close(result["mask_boundary"], boundary, rtol=0, atol=0)
    assert set(batch) == {"mask"}  # the given dictionary is left as it is


def test_instances_and_missing_keys(transforms) -> None:
    _, ids = glands(1, 48, seed=3, instances=True)
    data = {"ids": ids.numpy()}
    result = transforms.SignedDistanced(["ids", "other"], instances=True, allow_missing_keys=True)(data)
    sdf, _ = F.distance_targets(ids, instances=True)
    assert set(result) == {"ids", "ids_sdf", "ids_boundary"}
    torch.testing.assert_close(result["ids_sdf"], sdf, rtol=0, atol=0)
    with pytest.raises(KeyError, match="other"):
        transforms.SignedDistanced("other")(data)
    with pytest.raises(TypeError, match=r"a mask of dtype .* is ambiguous"):
        transforms.SignedDistanced("ids")({"ids": np.full((1, 8, 8), 0.5, np.float32)})


def test_arrays_that_pytorch_does_not_take(transforms) -> None:
    _, masks = glands(1, 32, seed=0)
    mask = masks.numpy()
    for array in (mask[:, :, ::-1], mask.astype(">i4")):
        result = transforms.SignedDistanced("mask")({"mask": array})
        torch.testing.assert_close(result["mask_sdf"], F.distance_targets(array)[0], rtol=0, atol=0)


def test_without_monai_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "semimoe_fast.monai" or name.split(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: run `pip install 'semimoe_fast\[monai\]'`"):
        importlib.import_module("semimoe_fast.monai")
