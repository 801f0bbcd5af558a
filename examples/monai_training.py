"""MONAI's loader, transforms, network and metric with our targets and losses: `python examples/monai_training.py`.

It needs MONAI: `pip install 'semimoe_fast[monai]'`. The images are synthetic glands, written to a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from monai.data import DataLoader, Dataset
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    RandFlipd,
    RandRotate90d,
    ScaleIntensityRanged,
)

from semimoe_fast import functional as F
from semimoe_fast import synthetic
from semimoe_fast.model import AdaptiveMultiObjectiveLoss
from semimoe_fast.monai import SignedDistanced

BOTH = ["image", "mask"]
READ = [
    LoadImaged(BOTH),
    EnsureChannelFirstd(BOTH),
    ScaleIntensityRanged("image", 0, 255, -1, 1),
    AsDiscreted("mask", threshold=1),  # the files have 255 on glands
]
VARY = [RandFlipd(BOTH, prob=0.5, spatial_axis=0), RandRotate90d(BOTH, prob=0.75)]


def pairs(folder: Path) -> list[dict[str, Path]]:
    return [{"image": path, "mask": folder / "mask" / path.name} for path in sorted((folder / "image").iterdir())]


def main(epochs: int = 1, images: int = 32, size: int = 64) -> list[float]:
    """Train, print the validation Dice of every epoch, and return the loss of every step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(2, 3, 5, channels=(16, 32, 64), strides=(2, 2)).to(device)  # mask 2, sdf 1, boundary 2 channels
    adaptive = AdaptiveMultiObjectiveLoss().to(device)
    optimizer = torch.optim.Adam([*network.parameters(), *adaptive.parameters()], lr=5e-3)
    with_targets, dice, losses = SignedDistanced("mask"), DiceMetric(), []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "glands"
        synthetic.write(synthetic.Folder(data, labeled=images, unlabeled=0, val=8, size=size))
        training = Dataset(pairs(data / f"train_sup_{images}"), Compose([*READ, *VARY]))
        validation = Dataset(pairs(data / "val"), Compose(READ))
        for epoch in range(epochs):
            network.train()
            for batch in DataLoader(training, batch_size=4, shuffle=True):
                batch = with_targets({key: batch[key].to(device) for key in BOTH})  # a whole batch, on its device
                mask, sdf, boundary = network(batch["image"]).split([2, 1, 2], 1)
                targets = batch["mask"], batch["mask_sdf"], batch["mask_boundary"]
                loss = adaptive(F.objective_terms(mask, sdf, boundary, *targets))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            network.eval()
            for batch in DataLoader(validation, batch_size=4):
                with torch.no_grad():
                    found = network(batch["image"].to(device))[:, :2].argmax(1, keepdim=True)
                dice(found, batch["mask"].to(device))
            print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, validation Dice {dice.aggregate().item():.3f}")
            dice.reset()
    return losses


if __name__ == "__main__":
    main()
