"""Segment images with a checkpoint: `python -m semimoe_fast.predict --checkpoint C --input FILE_OR_DIR --out DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import checkpoint
from .checkpoint import Preprocessing
from .data.folders import list_images, read_image
from .device import Precision, choose_device
from .errors import UserError, run_command
from .evaluation.overlay import outline
from .inference.predictor import require_mask, segment
from .options import read_options


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Write a mask for every image: a PNG of the size of the image, 255 on glands and 0 elsewhere.

    Existing masks of the same name are replaced.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    input: Path
    """An image, or a folder of images."""
    out: Path
    """Folder for the masks NAME.png; it is created if missing."""
    overlay: bool = False
    """Also write the image with the outlines drawn on it, NAME_overlay.png."""
    threshold: float = 0.5
    """Foreground probability above which a pixel is gland."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


def plan(config: PredictConfig) -> dict[Path, list[Path]]:
    """The files to write for each image: its mask and, with --overlay, its overlay.

    Raises UserError if there is no image, if --out is the folder of the images or a file, or if the overlay of one
    image and the mask of another have the same name.
    """
    paths = list_images(config.input) if config.input.is_dir() else [config.input]
    if not paths[0].exists():
        raise UserError(f"{config.input}: no such file or folder; give an image or a folder of images")
    if paths[0].parent.resolve() == config.out.resolve():
        raise UserError(
            f"--out is the folder of the images, {config.out}: masks would replace them, give another folder"
        )
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out is {config.out}, which is a file: give a folder")
    suffixes = ("", "_overlay") if config.overlay else ("",)
    by_stem = {path.stem: path for path in paths}  # stems are unique
    for path in paths if config.overlay else []:
        if other := by_stem.get(f"{path.stem}_overlay"):
            raise UserError(
                f"{path} and {other} would both be written to {config.out / other.stem}.png: "
                "rename one, or leave out --overlay"
            )
    return {path: [config.out / f"{path.stem}{suffix}.png" for suffix in suffixes] for path in paths}


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(PredictConfig, "semimoe_fast.predict", arguments)
    if not 0 <= config.threshold < 1:
        raise UserError(f"--threshold is {config.threshold}: give a number from 0 to below 1")
    outputs = plan(config)
    device = choose_device(config.device)
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    config.out.mkdir(parents=True, exist_ok=True)
    for path, (mask_path, *overlay_path) in tqdm(outputs.items(), "predict"):
        image = read_image(path)
        mask = segment(model, image, preprocessing, device, config.threshold, config.precision)
        Image.fromarray(mask.astype(np.uint8) * 255).save(mask_path)
        for file in overlay_path:
            Image.fromarray(outline(image, torch.from_numpy(mask))).save(file)
    print(f"masks written to {config.out}: {len(outputs)}")


if __name__ == "__main__":
    run_command(main)
