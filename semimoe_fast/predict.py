"""Segment images with a checkpoint: `python -m semimoe_fast.predict --checkpoint C --input FILE_OR_DIR --out DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import checkpoint
from . import functional as F
from .checkpoint import Preprocessing, write_atomically
from .data.folders import list_images, read_image
from .device import Precision, choose_device
from .errors import UserError, run_command
from .evaluation.overlay import outline
from .inference.instances import instances_of, skimage
from .inference.polygons import geojson
from .inference.predictor import fields, predict, require_mask
from .options import read_options


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Write a mask for every image: a PNG of the size of the image, 255 on glands and 0 elsewhere.

    With --instances, glands that touch are separated at valleys of the predicted signed distance field, or of the
    distance to the background if the checkpoint has no sdf expert. Existing files of the same names are replaced.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    input: Path
    """An image, or a folder of images."""
    out: Path
    """Folder for the masks NAME.png; it is created if missing."""
    instances: bool = False
    """Also separate glands: a label image instances/NAME.png and polygons for QuPath instances/NAME.geojson."""
    seed_level: float = 0.3
    """With --instances: share of a region's largest sdf above which a pixel is a seed; higher splits more."""
    least_area: int = 100
    """With --instances: fewest pixels of a gland, at the size of the image; smaller ones are only in NAME.png."""
    overlay: bool = False
    """Also write the image with the outlines drawn on it, overlay/NAME.png; with --instances, of each gland."""
    threshold: float = 0.5
    """Foreground probability above which a pixel is gland."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


def plan(config: PredictConfig) -> dict[Path, dict[str, Path]]:
    """The files to write for each image, by what they hold: mask, overlay, instances, polygons.

    Raises UserError if there is no image, or if an output folder is a file or the folder of the images.
    """
    paths = list_images(config.input) if config.input.is_dir() else [config.input]
    if not paths[0].exists():
        raise UserError(f"{config.input}: no such file or folder; give an image or a folder of images")
    places = {"mask": (config.out, ".png")}
    if config.overlay:
        places["overlay"] = config.out / "overlay", ".png"
    if config.instances:
        places["instances"], places["polygons"] = (
            (config.out / "instances", ".png"),
            (config.out / "instances", ".geojson"),
        )
    for folder, _ in places.values():
        if paths[0].parent.resolve() == folder.resolve():
            raise UserError(f"{folder} is the folder of the images: masks would replace them, give another --out")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: remove it, or give another --out")
    return {
        path: {kind: folder / f"{path.stem}{ending}" for kind, (folder, ending) in places.items()} for path in paths
    }


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(PredictConfig, "semimoe_fast.predict", arguments)
    if not 0 <= config.threshold < 1:
        raise UserError(f"--threshold is {config.threshold}: give a number from 0 to below 1")
    if not 0 <= config.seed_level < 1:
        raise UserError(f"--seed-level is {config.seed_level}: give a number from 0 to below 1")
    if config.least_area < 0:
        raise UserError(f"--least-area is {config.least_area}: give 0 or more")
    outputs = plan(config)
    if config.instances:
        skimage()  # an error now, and not after the first image
    device = choose_device(config.device)
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    for file in next(iter(outputs.values())).values():
        file.parent.mkdir(parents=True, exist_ok=True)
    for path, files in tqdm(outputs.items(), "predict"):
        image = read_image(path)
        output = predict(model, image, preprocessing, device, config.precision)
        probability, sdf = fields(output, image.shape[:2])
        if not all(field.isfinite().all() for field in (probability, sdf) if field is not None):
            raise UserError(
                f"{config.checkpoint} predicts NaN or inf on {path}: give a checkpoint that has not diverged"
            )
        mask = (probability > config.threshold).numpy()
        objects = mask
        if config.instances:
            objects = instances_of(mask, depth(mask) if sdf is None else sdf, config.seed_level, config.least_area)
            write_labels(files["instances"], objects)
            write_text(files["polygons"], geojson(objects, path.name))
        if config.overlay:
            write_png(files["overlay"], outline(image, objects))
        write_png(files["mask"], mask.astype(np.uint8) * 255)
    print(f"masks written to {config.out}: {len(outputs)}")


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance of the foreground of a mask (H, W) to the background, float32, in pixels; 0 where there is none."""
    return F.squared_distance(mask).clamp(min=0).sqrt().numpy() * mask


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write a label image (H, W) as a PNG of 16 bits, or as a TIFF of 32 bits if it has labels above 65,535."""
    wide = path.with_suffix(".tif")
    if labels.max() <= np.iinfo(np.uint16).max:
        write_png(path, labels.astype(np.uint16))
        wide.unlink(missing_ok=True)  # of an earlier call
    else:
        import tifffile  # scikit-image depends on it

        write_atomically(wide, lambda part: tifffile.imwrite(part, labels.astype(np.uint32)))
        path.unlink(missing_ok=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, "PNG"))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text))


if __name__ == "__main__":
    run_command(main)
