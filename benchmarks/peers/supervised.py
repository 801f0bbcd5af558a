"""One U-Net that learns from labels alone."""

from __future__ import annotations

from torch import Tensor

from semimoe_fast import functional as F

from .method import Batch, Method, unet


class Supervised(Method):
    """The squared Dice loss of the published recipe (Milletari et al., arXiv 1606.04797), on the labeled images.

    learns_from: "labeled", or "labels of all": the upper bound, for which the unlabeled images have their masks too.
    """

    def __init__(self, width: int, learns_from: str) -> None:
        super().__init__()
        self.network, self.learns_from = unet(width), learns_from

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[1]

    def loss(self, batch: Batch, progress: float) -> Tensor:
        return F.squared_dice_loss(self(batch.labeled), batch.masks)
