"""A consistency like that of UniMatch: strong changes of images and of features keep the labels of the weak view."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from semimoe_fast import functional as F

from .method import Batch, Method, unet

CONFIDENCE = 0.95
DROPOUT = 0.5  # of whole channels of the encoder's features
MIXED = 0.5  # probability of CutMix
AREA = 0.02, 0.4  # of a box, as a share of the image
RATIO = 0.3, 1 / 0.3  # of its sides


class UniMatch(Method):
    """After Yang et al., CVPR 2023 (arXiv 2208.09910), with their constants.

    loss = [s + (dice(strong 1) + dice(strong 2)) / 4 + dice(dropped) / 2] / 2, where s is the mean of Dice and
    cross-entropy of the labeled images, as in their code for medical images (with Dice alone, the network fell to all
    background at a learning rate of 0.5). The others compare with the argmax of the weak view at pixels where its
    probability is at least 0.95; `dropped` is the decoder on the weak view's features with half of their channels
    dropped. The weak view is the augmentation of all methods; a strong view changes its stain, brightness, sharpness
    and noise, and with probability 0.5 takes a box from another image of the batch (CutMix, arXiv 1905.04899), labels
    included.

    Differences from their code:
    - Stain in place of color jitter and grayscale, since H&E has two colors.
    - CutMix within the batch, so that all methods see equally many images. The labels of the other image come from the
      weak view in train mode, theirs from a prediction in eval mode. Boxes are cut to the image, theirs drawn again
      until they fit.
    - The squared Dice of the other methods: a mean over images, smoothed by 1. Theirs sums over the batch, smoothed by
      1e-5.
    - BN sees the labeled images, the weak view, the dropped features and each strong view apart. Theirs sees the first
      three together, dropped features of labeled images among them, and the two strong views together.
    """

    strong_views = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = unet(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[1]

    def loss(self, batch: Batch, progress: float) -> Tensor:
        count = len(batch.labeled)
        features = self.network.encode(torch.cat([batch.labeled, batch.unlabeled]), groups=2)
        features = [torch.cat([x, functional.dropout2d(x[count:], DROPOUT)]) for x in features]
        labeled, weak, dropped = self.network.head(self.network.decode(features, groups=3)).chunk(3)
        confidence, labels = weak.detach().softmax(1).max(1)
        labels = torch.where(confidence >= CONFIDENCE, labels, -1)

        boxes = [random_boxes(labels) for _ in batch.strong]
        views = [cut_mix(view, box[:, None]) for view, box in zip(batch.strong, boxes, strict=True)]
        strong = self.network(torch.cat(views), groups=len(views))[1].chunk(len(views))
        mixed = [cut_mix(labels, box) for box in boxes]
        changed = sum(confident_dice(*pair) for pair in zip(strong, mixed, strict=True)) / (2 * len(views))
        entropy = functional.cross_entropy(labeled.float(), batch.masks.long())
        supervised = (F.squared_dice_loss(labeled, batch.masks) + entropy) / 2
        return (supervised + changed + confident_dice(dropped, labels) / 2) / 2


def confident_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared Dice loss over the pixels with a label: logits (B, 2, S, S), labels (B, S, S), -1 where none."""
    known = labels >= 0
    probability = logits.float().softmax(1) * known[:, None]
    truth = torch.stack([labels == 0, labels == 1], 1)
    common = (probability * truth).sum((2, 3))
    return (1 - (2 * common + 1) / ((probability.square() + truth).sum((2, 3)) + 1)).mean()


def cut_mix(images: Tensor, boxes: Tensor) -> Tensor:
    """Images (B, ...) with the pixels in boxes, bool and broadcast, from the image before."""
    return torch.where(boxes, images.roll(1, 0), images)


def random_boxes(labels: Tensor) -> Tensor:
    """bool like labels (B, S, S): a box of random place and sides with probability MIXED, else nothing."""
    size = labels.shape[-1]
    boxes = torch.zeros_like(labels, dtype=torch.bool)
    for box in boxes:
        mixed, area, ratio, *corner = torch.rand(5).tolist()
        area = size**2 * (AREA[0] + area * (AREA[1] - AREA[0]))
        ratio = RATIO[0] + ratio * (RATIO[1] - RATIO[0])
        height, width = (min(size, round(math.sqrt(area * r))) for r in (1 / ratio, ratio))
        row, column = (int(x * (size - side + 1)) for x, side in zip(corner, (height, width), strict=True))
        if mixed < MIXED:
            box[row : row + height, column : column + width] = True
    return boxes
