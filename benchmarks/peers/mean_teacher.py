"""Mean Teacher: the student agrees with an average of its former weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from semimoe_fast import functional as F

from .method import Batch, Method, both, unet

DECAY = 0.99
WEIGHT = 5.0
NOISE, MOST_NOISE = 0.1, 0.2  # standard deviation and bound, of normalized pixels


class MeanTeacher(Method):
    """Tarvainen and Valpola, NeurIPS 2017 (arXiv 1703.01780).

    loss = dice(student, masks) + u mean (P_student - P_teacher)^2, P the softmax on unlabeled images, to which noise is
    added for the teacher. After step t the teacher is a teacher + (1 - a) student with a = min(1 - 1 / (t + 1), 0.99).
    The teacher predicts, with its own BN statistics.

    Constants as in the code of XNet (ICCV 2023), from which the published figures on GlaS are: u grows linearly to 5.
    But t counts steps, as in the paper; there it counts epochs, so that a reaches 0.99 only after about 100 epochs.
    """

    predicts_by_average = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.student = unet(width)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(images)[1]

    def loss(self, batch: Batch, progress: float) -> Tensor:
        unlabeled, labeled = both(self.student, batch)
        noise = (NOISE * torch.randn_like(batch.unlabeled)).clamp(-MOST_NOISE, MOST_NOISE)
        with torch.no_grad():
            target = self(batch.unlabeled + noise).softmax(1)
        consistency = (unlabeled.softmax(1) - target).square().mean()
        return F.squared_dice_loss(labeled, batch.masks) + WEIGHT * progress * consistency

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(1 - 1 / (step + 1), DECAY)
        torch._foreach_lerp_([*self.teacher.parameters()], [*self.student.parameters()], 1 - decay)
