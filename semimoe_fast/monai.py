"""The distance targets as a MONAI transform (`pip install 'semimoe_fast[monai]'`). No other module imports MONAI."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from . import functional as F

try:
    from monai.config import KeysCollection
    from monai.transforms import MapTransform
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"semimoe_fast.monai needs {error.name}, which is not installed: run `pip install 'semimoe_fast[monai]'`"
    ) from None

__all__ = ["SignedDistanced"]


class SignedDistanced(MapTransform):
    """Add the signed distance field and the boundary of masks to a dictionary of MONAI.

    For each key of a mask KEY the dictionary gets KEY_sdf, float32 in [-1, 1], and KEY_boundary, uint8 0/1, plain
    tensors shaped like the mask on its device: `functional.distance_targets`, which see for both and for the errors.

    A mask is that of one image, (1, H, W), or of a batch, (B, 1, H, W), on the CPU or on a GPU. So the transform works
    in a Compose and on the batches of a DataLoader, for which it computes all images in one call. Use it after crops,
    flips and resizing: the field is scaled by its largest distance in the image.

    keys: the masks; ring_radius: of the boundary, in pixels; instances: masks hold ids of instances, as integers.
    """

    def __init__(
        self, keys: KeysCollection, ring_radius: float = 2, instances: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ring_radius, self.instances = ring_radius, instances

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            mask = data[key]
            if isinstance(mask, torch.Tensor):
                mask = mask.as_subclass(torch.Tensor)  # without the metadata of a MetaTensor
            sdf, boundary = F.distance_targets(mask, self.ring_radius, self.instances)
            result[f"{key}_sdf"], result[f"{key}_boundary"] = sdf, boundary
        return result
