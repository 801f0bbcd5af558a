"""Segment images with a checkpoint: `python -m semimoe_fast.predict --checkpoint C --input FILE_OR_DIR --out DIR`."""

from __future__ import annotations

import dataclasses
import errno
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
from tqdm import tqdm

from . import checkpoint
from .checkpoint import MOST_PIXELS, Preprocessing
from .data.layout import listed
from .data.listing import list_images, note_of_others
from .data.readers import SLIDES, Reader
from .device import Precision, choose_device, configure_prediction
from .errors import UserError, explain, one_line, printable, run_command, warn
from .files import write_png, write_text
from .inference.finished import Finished, state_of
from .inference.folding import folded
from .inference.image import TASK, Field, Fields, Squashed, is_slide, open_for, predict_image
from .inference.instances import depth, instances_of, skimage
from .inference.outputs import full_mpp, open_instances, open_streams, write_labels, write_overlay
from .inference.polygons import geojson
from .inference.predictor import require_mask
from .inference.scale import check_scale
from .inference.tiles import TILE, overlap_of
from .model import SemiMoE
from .options import read_options

UNSETTLED = ("checkpoint", "input", "out", "overwrite")  # options that do not decide what the outputs hold
MOST_IN_MEMORY = 2**24  # pixels of an image whose instances are separated at once, which takes 50 bytes a pixel
MOST_WITH_OVERLAY = 2**26  # pixels of an image for --overlay, which holds it as a whole
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")  # of a file, where a folder is asked for
OME = ".ome.tif"  # ending of the files of fields
BAR = "{desc}{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"  # parts of a large image count, too


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """What is predicted, and where the results go."""

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    input: Path
    """An image, or a folder of images."""
    out: Path
    """Folder for the masks NAME.png; it is created if missing."""
    overwrite: bool = False
    """Replace existing files of the same names, PNG or TIFF; the checkpoint, images and their masks never."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """The masks, and what is written beside them."""

    threshold: float = 0.5
    """Foreground probability above which a pixel is gland."""
    overlay: bool = False
    """Also write the image with the outlines drawn on it, overlay/NAME.png, of images of up to 67 megapixels."""
    probability: bool = False
    """Also write the foreground probability, probability/NAME.ome.tif: tiled, float16."""
    fields: bool = False
    """Also write the signed distance field and the probability of the boundary, sdf/ and boundary/NAME.ome.tif."""


@dataclasses.dataclass(frozen=True)
class GlandOptions:
    """Single glands."""

    instances: bool = False
    """Also separate glands: label images instances/NAME.png (.tif if large), and polygons instances/NAME.geojson."""
    seed_level: float = 0.3
    """With --instances: share of a region's largest sdf above which a pixel is a seed; higher splits more."""
    least_area: int = 100
    """With --instances: fewest pixels of a gland, at the size of the image; smaller ones are only in the mask."""


@dataclasses.dataclass(frozen=True)
class ComputingOptions:
    """The scale, the tiles and the device."""

    scale: Annotated[float | None, "FLOAT", "see above"] = None
    """Predict in tiles at so many pixels of the model per pixel of the image, 0.01 to 16, whatever the checkpoint."""
    mpp: Annotated[float | None, "FLOAT", "see above"] = None
    """Predict in tiles at so many microns per pixel, 0.02 to 20; the files must say their resolution."""
    tile_size: int = TILE
    """Side of the tiles in pixels of the model, a multiple of 16; smaller ones need less memory and more time."""
    skip_background: Literal["auto", "on", "off"] = "auto"
    """Do not compute tiles of bright background; auto: on for whole-slide formats only."""
    tta: bool = False
    """Average the predictions over the eight flips and rotations, which takes eight times as long."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 on the CPU."""


@dataclasses.dataclass(frozen=True)
class PredictConfig(ComputingOptions, GlandOptions, OutputOptions, FileOptions):  # fields and help start with the last
    """Write a mask for every image: a PNG of the size of the image, 255 on glands and 0 elsewhere.

    A checkpoint of --sampling crops is applied at the images' own scale, or at its microns per pixel if both are known,
    in overlapping tiles; one of --sampling resize to the whole image, squashed to its training square. The mask of
    an image with a side above 16384 pixels, or of a whole-slide format, is a tiled TIFF, NAME.tif.

    With --instances, glands that touch are separated at valleys of the predicted signed distance field, or of the
    distance to the background if the checkpoint has no sdf expert. The same call after an interruption or a failure
    goes on with the images of the folder that are missing. One call at a time writes into a folder.
    """


def check(config: PredictConfig) -> None:
    """Raise UserError for values that cannot be used."""
    if not 0 <= config.threshold < 1:
        raise UserError(f"--threshold is {config.threshold}: give a number from 0 to below 1")
    if not 0 <= config.seed_level < 1:
        raise UserError(f"--seed-level is {config.seed_level}: give a number from 0 to below 1")
    if config.least_area < 0:
        raise UserError(f"--least-area is {config.least_area}: give 0 or more")
    for name in ("seed_level", "least_area"):
        value = getattr(config, name)
        if value != getattr(PredictConfig, name) and not config.instances:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it needs --instances; add that, or leave it out")
    check_scale(config.scale, config.mpp)
    try:
        overlap_of(config.tile_size)
    except ValueError:
        raise UserError(f"--tile-size is {config.tile_size}: give a positive multiple of 16") from None


def require_effect(config: PredictConfig, model: SemiMoE, preprocessing: Preprocessing) -> None:
    """Raise UserError for an option that changes nothing with this checkpoint."""
    if config.fields and not {"sdf", "boundary"} & set(model.tasks):
        raise UserError(f"--fields: {config.checkpoint} has no expert for sdf or boundary; leave it out")
    if config.tile_size != TILE and preprocessing.sampling == "resize" and config.scale is None and config.mpp is None:
        square = preprocessing.image_size
        raise UserError(
            f"--tile-size is {config.tile_size}, but images are squashed to the {square} x {square} of "
            f"{config.checkpoint}: add --scale or --mpp to predict in tiles, or leave it out"
        )


def plan(config: PredictConfig) -> dict[Path, dict[str, Path]]:
    """The files to write for each image, by what they hold: mask, fields, overlay, instances, polygons.

    Raises UserError if there is no image, if an output folder is a file or the folder of the images or of their masks,
    or if two images have an output in common.
    """
    paths = list_images(config.input, also=SLIDES) if config.input.is_dir() else [config.input]
    if not paths[0].exists():
        raise UserError(f"{config.input}: no such file or folder; give an image or a folder of images")
    places = {"mask": (config.out, ".png")}
    kinds = ["probability"] * config.probability + ["sdf", "boundary"] * config.fields
    places |= {kind: (config.out / kind, OME) for kind in kinds}
    if config.overlay:
        places["overlay"] = config.out / "overlay", ".png"
    if config.instances:
        places["instances"], places["polygons"] = (
            (config.out / "instances", ".png"),
            (config.out / "instances", ".geojson"),
        )
    folders = {folder for path in paths for folder in (path.parent.absolute(), path.resolve().parent)}  # of links, too
    masks = {(folder.parent / "mask").resolve() for folder in folders if folder.name == "image"}
    if config.out.resolve() in masks and config.out.is_dir() and any(config.out.iterdir()):
        raise UserError(f"--out is {config.out}, which has the masks of these images: give another folder")
    if config.out.suffix.lower() in SUFFIXES and not config.out.is_dir():
        raise UserError(f"--out is {config.out}, but it is a folder for files NAME.png: leave out {config.out.suffix}")
    for folder, _ in places.values():
        if paths[0].parent.resolve() == folder.resolve():
            raise UserError(f"{folder} is the folder of the images: masks would replace them, give another --out")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: remove it, or give another --out")
    outputs = {
        path: {kind: folder / named(path, ending) for kind, (folder, ending) in places.items()} for path in paths
    }
    owner: dict[Path, Path] = {}
    for path, files in outputs.items():
        for file in files.values():
            if (other := owner.setdefault(file, path)) != path:
                raise UserError(f"{other} and {path.name} would both be written to {file}: remove or rename one")
    return outputs


def named(path: Path, ending: str) -> str:
    """The name of an output: the stem of the image, by which evaluate pairs masks; of fields without another .ome."""
    return (path.stem.removesuffix(".ome") if ending == OME else path.stem) + ending


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(PredictConfig, "semimoe_fast.predict", arguments)
    check(config)
    outputs = plan(config)
    if config.input.is_dir() and (note := note_of_others(config.input, SLIDES)):
        warn(note)
    if config.instances:
        skimage()  # an error now, and not after the first image
    device = choose_device(config.device)
    configure_prediction(device, config.precision)
    model, metadata, _ = checkpoint.load(config.checkpoint, device)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    outputs = {path: of_tasks(files, model.tasks) for path, files in outputs.items()}
    require_effect(config, model, preprocessing)
    kinds = next(iter(outputs.values()))
    needed = {"probability", *kinds, *(["sdf"] if config.instances and "sdf" in model.tasks else [])}
    fields = [field for field in TASK if field in needed]
    model = folded(model, [TASK[field] for field in fields])
    with Finished(config.out, settings(config)) as finished:
        if finished.others and not config.overwrite:
            raise UserError(
                f"{finished.path} counts images of an interrupted call with other options or images "
                f"({finished.others}): repeat that call, give another --out, or --overwrite to forget it"
            )
        require_free(outputs, config, finished)
        for file in kinds.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        finished.begin()
        try:
            predict_all(outputs, finished, model, preprocessing, fields, config)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on with the images that are missing") from None
        finished.forget()


def predict_all(
    outputs: dict[Path, dict[str, Path]],
    finished: Finished,
    model: SemiMoE,
    preprocessing: Preprocessing,
    fields: Sequence[Field],
    config: PredictConfig,
) -> None:
    """Predict the images that are not finished. In a folder, those that cannot be read are listed at the end."""
    done = [path for path, files in outputs.items() if path in finished and complete(files.values())]
    missing = [path for path in outputs if path not in done]
    if done:
        print(f"images that an earlier call has predicted: {len(done)}; going on with the others")
    squashed, failed = 0, []  # squashed images that are far from the training images
    with tqdm(total=len(missing), bar_format=BAR) as bar:
        for number, path in enumerate(missing, 1):
            bar.set_description(f"predict {number}/{len(missing)}")
            try:
                state = state_of(path)
                with open_for(path, preprocessing, config.scale, config.mpp) as image:
                    if image.note and not (squashed and isinstance(image, Squashed)):
                        warn(image.note)
                    squashed += bool(image.note) and isinstance(image, Squashed)
                    finished.start(path)
                    predict_file(image, outputs[path], model, preprocessing, fields, config, bar.update)
                finished.add(state)
            except (UserError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                    raise  # a full disk, for example, which the next image would meet, too
                if not config.input.is_dir():
                    finished.forget()  # there is nothing to go on with
                    raise
                warn(f"{explain(error)}; going on with the other images")
                failed.append(path)
            bar.update(number - bar.n)  # the rest of an image that failed
    if squashed > 1:
        warn(f"images that are squashed, although they are far from the training images: {squashed - 1} more")
    kinds = ", ".join(next(iter(outputs.values())))
    print(one_line(f"images predicted to {config.out}: {len(outputs) - len(failed)} ({kinds})"))
    if failed:
        names = listed([path.name for path in failed])
        print(one_line(f"error: {len(failed)} of {len(outputs)} images failed: {names}"), file=sys.stderr)
        sys.exit(1)


def require_free(outputs: dict[Path, dict[str, Path]], config: PredictConfig, finished: Finished) -> None:
    """Raise UserError if an output would replace an image or the checkpoint, or without --overwrite any other file.

    Outputs of images that an interrupted call has started are its own.
    """
    inputs = {path.resolve() for path in (*outputs, config.checkpoint)}
    for path, files in outputs.items():
        for kind, file in files.items():
            other = [file.with_suffix(".tif")] if kind in ("mask", "instances") else []  # the name of a large one
            for place in (file, *other):
                if place.resolve() in inputs:
                    raise UserError(f"{place} is an input, {place.resolve()}: give another --out")
                if os.path.lexists(place) and not (config.overwrite or finished.has_started(path)):
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
    progress: Callable[[float], object],
) -> None:
    """Write the files of an image, its mask last. Each appears under its final name when it is whole.

    progress: called with the share of the image that each piece is.
    """
    size, path = image.full_size, image.path
    pixels, large = math.prod(size), max(size) > MOST_PIXELS or is_slide(path)
    if config.overlay and pixels > MOST_WITH_OVERLAY:
        raise UserError(
            f"{path} is {size[1]} x {size[0]} pixels, and --overlay takes images of up to "
            f"{MOST_WITH_OVERLAY / 1e6:.3g} megapixels: leave it out, or cut the image"
        )
    mask_file, other = files["mask"], files["mask"].with_suffix(".tif")
    if large:
        mask_file, other = other, mask_file
    streamed = ({"mask": mask_file} if large else {}) | {field: files[field] for field in fields if field in files}
    skip = is_slide(path) if config.skip_background == "auto" else config.skip_background == "on"
    options = {"fields": fields, "tile": config.tile_size, "tta": config.tta, "skip_background": skip}
    device = next(model.parameters()).device
    stitched = config.instances and (large or pixels > MOST_IN_MEMORY)
    masks, sdfs, labels = [], [], []
    with ExitStack() as stack:
        streams = open_streams(image, streamed, stack)
        if stitched:
            tables = files["instances"].with_suffix(".tif"), files["polygons"]
            add = open_instances(image, *tables, config.seed_level, config.least_area, stack)
        for _, piece in predict_image(model, image, preprocessing, device, **options, precision=config.precision):
            require_finite(piece, config.checkpoint, path)
            mask = (piece.probability > config.threshold).numpy()
            for kind, stream in streams.items():
                stream.write(mask * np.uint8(255) if kind == "mask" else getattr(piece, kind).numpy())
            if stitched:
                rows = add(mask, None if piece.sdf is None else piece.sdf.numpy())
                labels += [rows] * config.overlay
            if not large or (config.overlay and not stitched):
                masks.append(mask)
            if config.instances and not stitched:
                sdfs.append(piece.sdf)
            progress(mask.size / pixels)
        if config.instances and not stitched:
            sdf = torch.cat(sdfs).numpy() if "sdf" in fields else None
            labels = [write_instances(image, np.concatenate(masks), sdf, files, config)]
        if config.overlay:
            write_overlay(image, np.concatenate(labels if config.instances else masks), files["overlay"])
    if not large:
        write_png(mask_file, np.concatenate(masks) * np.uint8(255))
    if stitched:
        files["instances"].unlink(missing_ok=True)  # of an earlier call, as this one
    other.unlink(missing_ok=True)


def require_finite(piece: Fields, source: Path, path: Path) -> None:
    if not all(field.isfinite().all() for field in piece if field is not None):
        raise UserError(f"{source} predicts NaN or inf on {path}: give a checkpoint that has not diverged")


def write_instances(
    image: Reader, mask: np.ndarray, sdf: np.ndarray | None, files: dict[str, Path], config: PredictConfig
) -> np.ndarray:
    """Write label image and polygons of an image that is held as a whole; the label image."""
    labels = instances_of(mask, depth(mask, image.path) if sdf is None else sdf, config.seed_level, config.least_area)
    write_labels(files["instances"], labels, full_mpp(image))
    write_text(files["polygons"], geojson(labels, image.path.name))
    return labels


if __name__ == "__main__":
    run_command(main)
