"""Semi-MoE in a bare PyTorch loop, on synthetic glands: `python examples/plain_pytorch.py`.

Everything that the trainer adds (augmentation, schedules, resuming, several devices) is left out.
"""

from __future__ import annotations

import torch

from semimoe_fast import functional as F
from semimoe_fast.data.augment import normalize
from semimoe_fast.data.glands import glands
from semimoe_fast.inference.predictor import gated_foreground
from semimoe_fast.model import AdaptiveMultiObjectiveLoss, SemiMoE
from semimoe_fast.objective import objective


def main(epochs: int = 10, labeled: int = 8, unlabeled: int = 32, size: int = 64, width: int = 8) -> list[float]:
    """Train, print a line per epoch, and return the supervised loss of every step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, masks = (x.to(device) for x in glands(labeled + unlabeled, size, seed=0))
    mean, std = (images.float() / 255).mean((0, 2, 3)), (images.float() / 255).std((0, 2, 3))
    images = normalize(images, mean, std)
    validation, truth = (x.to(device) for x in glands(8, size, seed=1))

    model, adaptive = SemiMoE(width=width).to(device), AdaptiveMultiObjectiveLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer_of_weights = torch.optim.Adam(adaptive.parameters(), lr=1e-2)
    losses, batch = [], 4
    for epoch in range(epochs):
        model.train()
        labeled_order = torch.randperm(labeled).repeat(-(-unlabeled // labeled))
        unlabeled_order = labeled + torch.randperm(unlabeled)
        for mine, others in zip(labeled_order.split(batch), unlabeled_order.split(batch), strict=False):
            targets = (masks[mine], *F.distance_targets(masks[mine]))  # mask, signed distance, boundary
            weight = 0.5 * epoch / epochs  # of the pseudo-labels, from 0 because they are wrong at first
            step = objective(model, adaptive, images[mine], targets, images[others], weight)
            optimizer.zero_grad()
            optimizer_of_weights.zero_grad()
            step.total.backward()
            optimizer.step()
            optimizer_of_weights.step()
            losses.append(step.supervised_total.item())

        with torch.no_grad():
            found = gated_foreground(model.eval()(normalize(validation, mean, std))) > 0.5
        dice = 2 * (found & (truth > 0)).sum() / (found.sum() + (truth > 0).sum())
        print(f"epoch {epoch + 1}: supervised loss {losses[-1]:.3f}, validation Dice {dice:.3f}")
    return losses


if __name__ == "__main__":
    main()
