"""Cross pseudo supervision: two networks label the unlabeled images for each other."""

from __future__ import annotations

from torch import Tensor, nn

from semimoe_fast import functional as F

from .method import Batch, Method, both, unet

WEIGHT = 5.0


class CPS(Method):
    """Chen et al., CVPR 2021 (arXiv 2106.01226), with two U-Nets of different initial weights.

    loss = dice(1, masks) + dice(2, masks) + u [dice(1, labels of 2) + dice(2, labels of 1)], where the labels are the
    argmax on the unlabeled images, without gradient. The first network predicts.

    As in the code of XNet (ICCV 2023), from which the published figures on GlaS are, the loss is Dice in place of the
    cross-entropy, and u grows linearly to 5; the paper has a constant 1.5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(unet(width) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.networks[0](images)[1]

    def loss(self, batch: Batch, progress: float) -> Tensor:
        (unlabeled, labeled), (other_unlabeled, other_labeled) = (both(network, batch) for network in self.networks)
        supervised = F.squared_dice_loss(labeled, batch.masks) + F.squared_dice_loss(other_labeled, batch.masks)
        crossed = F.squared_dice_loss(unlabeled, other_unlabeled.argmax(1))
        crossed = crossed + F.squared_dice_loss(other_unlabeled, unlabeled.argmax(1))
        return supervised + WEIGHT * progress * crossed
