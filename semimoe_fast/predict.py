"""Segment images with a checkpoint: `python -m semimoe_fast.predict --checkpoint C --input FILE_OR_DIR --out DIR`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import checkpoint
from .checkpoint import MOST_PIXELS, Preprocessing, replacing, write_atomically
from .data.folders import list_images
from .data.readers import SLIDES, Reader, open_image
from .device import Precision, choose_device, keep_freed_memory
from .errors import UserError, one_line, printable, run_command, warn
from .evaluation.overlay import outline
from .inference.finished import Finished
from .inference.folding import folded
from .inference.image import TASK, Field, Fields, Squashed, is_slide, open_for, predict_image
from .inference.instances import depth, instances_of, skimage
from .inference.polygons import GeojsonFile, geojson
from .inference.predictor import require_mask
from .inference.stitching import Stitcher
from .inference.tiled_tiff import TiledTiff
from .inference.tiles import TILE, overlap_of
from .model import SemiMoE
from .options import read_options

UNSETTLED = ("checkpoint", "input", "out", "overwrite")  # options that do not decide what the outputs hold
MOST_IN_MEMORY = 2**26  # pixels of an image that is held as a whole, for instances and overlays


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Write a mask for every image: a PNG of the size of the image, 255 on glands and 0 elsewhere.

    A checkpoint of --sampling crops is applied at the images' own scale, or at its microns per pixel if both are known,
    in overlapping tiles; one of --sampling resize to the whole image, squashed to its training square. The mask of
    an image with a side above 16384 pixels, or of a whole-slide format, is a tiled TIFF, NAME.tif.

    With --instances, glands that touch are separated at valleys of the predicted signed distance field, or of the
    distance to the background if the checkpoint has no sdf expert. The same call after an interruption or a failure
    goes on with the images of the folder that are missing.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    input: Path
    """An image, or a folder of images."""
    out: Path
    """Folder for the masks NAME.png; it is created if missing."""
    overwrite: bool = False
    """Replace existing files of the same names; images and the checkpoint are never replaced."""
    scale: Annotated[float | None, "FLOAT", "see above"] = None
    """Predict in tiles at so many pixels of the model per pixel of the image, whatever the checkpoint."""
    mpp: Annotated[float | None, "FLOAT", "see above"] = None
    """Predict in tiles at so many microns per pixel; the files must say their resolution."""
    tile_size: int = TILE
    """Side of the tiles in pixels of the model, a multiple of 16; smaller ones need less memory and more time."""
    skip_background: Literal["auto", "on", "off"] = "auto"
    """Do not compute tiles of bright background; auto: on for whole-slide formats only."""
    tta: bool = False
    """Average the predictions over the eight flips and rotations, which takes eight times as long."""
    probability: bool = False
    """Also write the foreground probability, probability/NAME.ome.tif: tiled, float16."""
    fields: bool = False
    """Also write the signed distance field and the probability of the boundary, sdf/ and boundary/NAME.ome.tif."""
    instances: bool = False
    """Also separate glands: a label image instances/NAME.png (NAME.tif if large), and polygons, NAME.geojson."""
    seed_level: float = 0.3
    """With --instances: share of a region's largest sdf above which a pixel is a seed; higher splits more."""
    least_area: int = 100
    """With --instances: fewest pixels of a gland, at the size of the image; smaller ones are only in the mask."""
    overlay: bool = False
    """Also write the image with the outlines drawn on it, overlay/NAME.png, of images of up to 67 megapixels."""
    threshold: float = 0.5
    """Foreground probability above which a pixel is gland."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


def check(config: PredictConfig) -> None:
    """Raise UserError for values that cannot be used."""
    if not 0 <= config.threshold < 1:
        raise UserError(f"--threshold is {config.threshold}: give a number from 0 to below 1")
    if not 0 <= config.seed_level < 1:
        raise UserError(f"--seed-level is {config.seed_level}: give a number from 0 to below 1")
    if config.least_area < 0:
        raise UserError(f"--least-area is {config.least_area}: give 0 or more")
    for name, value in (("--scale", config.scale), ("--mpp", config.mpp)):
        if value is not None and not 0 < value < np.inf:
            raise UserError(f"{name} is {value}: give a positive number")
    if config.scale is not None and config.mpp is not None:
        raise UserError("--scale and --mpp: both given; give one of them")
    try:
        overlap_of(config.tile_size)
    except ValueError:
        raise UserError(f"--tile-size is {config.tile_size}: give a positive multiple of 16") from None


def plan(config: PredictConfig) -> dict[Path, dict[str, Path]]:
    """The files to write for each image, by what they hold: mask, fields, overlay, instances, polygons.

    Raises UserError if there is no image, or if an output folder is a file or the folder of the images.
    """
    paths = list_images(config.input, also=SLIDES) if config.input.is_dir() else [config.input]
    if not paths[0].exists():
        raise UserError(f"{config.input}: no such file or folder; give an image or a folder of images")
    places = {"mask": (config.out, ".png")}
    kinds = ["probability"] * config.probability + ["sdf", "boundary"] * config.fields
    places |= {kind: (config.out / kind, ".ome.tif") for kind in kinds}
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
    check(config)
    outputs = plan(config)
    if config.instances:
        skimage()  # an error now, and not after the first image
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    outputs = {path: of_tasks(files, model.tasks) for path, files in outputs.items()}
    finished = Finished(config.out, settings(config)) if config.input.is_dir() else None
    require_free(outputs, config, resumed=finished is not None and finished.resumed)
    kinds = next(iter(outputs.values()))
    for file in kinds.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    needed = {"probability", *kinds, *(["sdf"] if config.instances and "sdf" in model.tasks else [])}
    fields = [field for field in TASK if field in needed]
    model = folded(model, [TASK[field] for field in fields])

    if finished:
        finished.begin()
    done = [path for path, files in outputs.items() if finished and path in finished and complete(files.values())]
    missing = [path for path in outputs if path not in done]
    if done:
        print(f"images that an interrupted call has predicted: {len(done)}; going on with the others")
    warned, failed = False, []
    with tqdm(desc="predict", unit="px", unit_scale=True) as bar:
        for number, path in enumerate(missing, 1):
            bar.set_description(f"predict {number}/{len(missing)}")
            try:
                with open_for(path, preprocessing, config.scale, config.mpp) as image:
                    bar.total = (bar.total or 0) + math.prod(image.full_size)
                    bar.refresh()
                    if image.note and not (warned and isinstance(image, Squashed)):  # one of many squashed ones will do
                        warn(image.note)
                        warned |= isinstance(image, Squashed)
                    predict_file(image, outputs[path], model, preprocessing, fields, config, bar.update)
            except UserError as error:
                if finished is None:
                    raise
                warn(f"{error}; going on with the other images")
                failed.append(path)
                continue
            if finished:
                finished.add(path)
    print(one_line(f"masks written to {config.out}: {len(outputs) - len(failed)}"))
    if failed:
        names = ", ".join(path.name for path in failed)
        print(one_line(f"error: {len(failed)} of {len(outputs)} images failed: {names}"), file=sys.stderr)
        sys.exit(1)
    if finished:
        finished.forget()


def require_free(outputs: dict[Path, dict[str, Path]], config: PredictConfig, resumed: bool) -> None:
    """Raise UserError if an output would replace an image or the checkpoint, or without --overwrite any other file.

    resumed: the existing files are those of an interrupted call.
    """
    inputs = {path.resolve() for path in (*outputs, config.checkpoint)}
    for files in outputs.values():
        for kind, file in files.items():
            other = [file.with_suffix(".tif")] if kind in ("mask", "instances") else []  # the name of a large one
            for place in (file, *other):
                if place.resolve() in inputs:
                    raise UserError(f"{place} is an input, {place.resolve()}: give another --out")
                if os.path.lexists(place) and not (config.overwrite or resumed):
                    raise UserError(f"{place} exists: give another --out, or --overwrite to replace such files")


def of_tasks(files: dict[str, Path], tasks: Sequence[str]) -> dict[str, Path]:
    """Without the files of fields that no expert predicts."""
    return {kind: file for kind, file in files.items() if TASK.get(kind, "mask") in tasks}


def settings(config: PredictConfig) -> dict[str, str]:
    """All that decides what the outputs hold: the content of the checkpoint, the input and the options."""
    with config.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = {name: str(value) for name, value in vars(config).items() if name not in UNSETTLED}
    return {"checkpoint": digest, "input": printable(str(config.input.resolve())), **options}


def complete(files: Iterable[Path]) -> bool:
    """Whether all files have been written. For NAME.png of a large image that is NAME.tif."""
    return all(file.exists() or (file.suffix == ".png" and file.with_suffix(".tif").exists()) for file in files)


def predict_file(
    image: Reader,
    files: dict[str, Path],
    model: SemiMoE,
    preprocessing: Preprocessing,
    fields: Sequence[Field],
    config: PredictConfig,
    progress: Callable[[int], object],
) -> None:
    """Write the files of an image, its mask last. Each appears under its final name when it is whole.

    progress: called with the number of pixels of each piece that is predicted.
    """
    size, path = image.full_size, image.path
    large, in_memory = max(size) > MOST_PIXELS or is_slide(path), math.prod(size) <= MOST_IN_MEMORY
    if config.overlay and not in_memory:
        raise UserError(
            f"{path} is {size[1]} x {size[0]} pixels, and --overlay takes images of up to {MOST_IN_MEMORY / 1e6:.3g} "
            "megapixels: leave it out, or cut the image"
        )
    mask_file, other = files["mask"], files["mask"].with_suffix(".tif")
    if large:
        mask_file, other = other, mask_file
    streamed = ({"mask": mask_file} if large else {}) | {field: files[field] for field in fields if field in files}
    skip = is_slide(path) if config.skip_background == "auto" else config.skip_background == "on"
    options = {"fields": fields, "tile": config.tile_size, "tta": config.tta, "skip_background": skip}
    device = next(model.parameters()).device
    stitched = config.instances and (large or not in_memory)
    masks, sdfs, labels = [], [], []
    with ExitStack() as stack:
        streams = open_streams(image, streamed, stack)
        instances = open_instances(image, files, config, stack) if stitched else None
        for _, piece in predict_image(model, image, preprocessing, device, **options, precision=config.precision):
            require_finite(piece, config.checkpoint, path)
            mask = (piece.probability > config.threshold).numpy()
            for kind, stream in streams.items():
                stream.write(mask * np.uint8(255) if kind == "mask" else getattr(piece, kind).numpy())
            if instances:
                rows = instances(mask, None if piece.sdf is None else piece.sdf.numpy())
                labels += [rows] * config.overlay
            if not large or (config.overlay and not stitched):
                masks.append(mask)
            if config.instances and not stitched:
                sdfs.append(piece.sdf)
            progress(mask.size)
        if config.instances and not stitched:
            sdf = torch.cat(sdfs).numpy() if "sdf" in fields else None
            labels = [write_instances(path, np.concatenate(masks), sdf, files, config)]
        if config.overlay:
            write_overlay(path, np.concatenate(labels if config.instances else masks), files["overlay"])
    if not large:
        write_png(mask_file, np.concatenate(masks) * np.uint8(255))
    if stitched:
        files["instances"].unlink(missing_ok=True)  # of an earlier call, as this one
    other.unlink(missing_ok=True)


def open_instances(
    image: Reader, files: dict[str, Path], config: PredictConfig, stack: ExitStack
) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    """Open label image and polygons of an image that is not held as a whole; they are finished as the stack closes.

    -> a function that takes mask and sdf of the next rows, and returns the rows of the label image that it wrote.
    """
    polygons = stack.enter_context(GeojsonFile(stack.enter_context(replacing(files["polygons"])), image.path.name))
    part = stack.enter_context(replacing(files["instances"].with_suffix(".tif")))
    stream = stack.enter_context(TiledTiff(part, image.full_size, "uint32", full_mpp(image)))
    stitcher = Stitcher(image.full_size, polygons.write, config.seed_level, config.least_area)

    def write(mask: np.ndarray, sdf: np.ndarray | None) -> np.ndarray:
        rows = stitcher.add(mask, sdf)
        stream.write(rows)
        return rows

    return write


def full_mpp(image: Reader) -> float | None:
    """Microns per pixel of an image at its full size."""
    return None if image.mpp is None else image.mpp * image.size[0] / image.full_size[0]


def open_streams(image: Reader, files: dict[str, Path], stack: ExitStack) -> dict[str, TiledTiff]:
    """A TIFF file of the size of the image for each file, by what it holds.

    They get their final names when the stack closes without an error, the first one last.
    """
    streams = {}
    for kind, file in files.items():
        dtype, channel = ("uint8", None) if kind == "mask" else ("float16", kind)
        part = stack.enter_context(replacing(file))
        streams[kind] = stack.enter_context(TiledTiff(part, image.full_size, dtype, full_mpp(image), channel))
    return streams


def require_finite(piece: Fields, source: Path, path: Path) -> None:
    if not all(field.isfinite().all() for field in piece if field is not None):
        raise UserError(f"{source} predicts NaN or inf on {path}: give a checkpoint that has not diverged")


def write_instances(
    path: Path, mask: np.ndarray, sdf: np.ndarray | None, files: dict[str, Path], config: PredictConfig
) -> np.ndarray:
    """Write label image and polygons of an image that is held as a whole; the label image."""
    labels = instances_of(mask, depth(mask) if sdf is None else sdf, config.seed_level, config.least_area)
    write_labels(files["instances"], labels)
    write_text(files["polygons"], geojson(labels, path.name))
    return labels


def write_overlay(path: Path, objects: np.ndarray, file: Path) -> None:
    with open_image(path) as image:
        write_png(file, outline(image.read(0, 0, *image.size), objects))


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
