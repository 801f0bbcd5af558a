"""The values of a decoded mask file, and the kinds of files whose foreground is ambiguous."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError

REMEDY = "save it as a PNG of one channel with class or instance numbers, 0 for background"
LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000", "WEBP": "WebP", "AVIF": "AVIF", "HEIF": "HEIF"}
LOSSY_TIFF = {  # values of the tag Compression
    **dict.fromkeys((6, 7, 34892), "JPEG"),
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    50001: "WebP",
}
COMPRESSION, PHOTOMETRIC, SAMPLE_FORMAT = 259, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, (2,)  # values of the last two


def stored_values(path: Path, image: Image.Image, deep: bool) -> np.ndarray:
    """The stored values of a mask, of a palette image the indices: (H, W) of an integer dtype; bool if 1-bit.

    deep: whether the file has more than 8 bits per channel. Raises UserError for color images, floating-point values,
    formats that may lose values, and files that show 0 as white or disagree with their own alpha channel.
    """
    tags = getattr(image, "tag_v2", {})
    lossy = LOSSY.get(image.format or "") or LOSSY_TIFF.get(tags.get(COMPRESSION))
    if lossy is not None:
        raise UserError(f"{path} is compressed as {lossy}, which can add non-zero values around each gland: {REMEDY}")
    if image.mode == "F":
        raise UserError(f"{path} holds floating-point values: {REMEDY}")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise UserError(f"{path} is a TIFF that shows 0 as white, so its glands may be 0 or not: {REMEDY}")
    if image.mode == "1" and image.format == "PPM":
        raise UserError(f"{path} is a PBM, which shows 0 as white, so its glands may be 0 or not: {REMEDY}")
    if image.mode == "P" and image.format == "GIF":
        raise UserError(f"{path} is a GIF, and programs that write GIF renumber the values: {REMEDY}")
    values = np.array(image)
    if image.mode == "P" and _shows_zero_as_white(values, image):
        raise UserError(f"{path} has a palette that shows 0 as white, so its glands may be 0 or not: {REMEDY}")
    if values.ndim == 2:
        signed = values.dtype == np.uint8 and tags.get(SAMPLE_FORMAT) == SIGNED  # Pillow reads 8 bits as unsigned
        return values.view(np.int8) if signed else values
    alpha = values[..., -1] if "A" in image.getbands() else None
    colors = values if alpha is None else values[..., :-1]
    if deep or (colors != colors[..., :1]).any():  # Pillow keeps only the high bytes of deep colors
        raise UserError(f"{path} is a color image (mode {image.mode}): {REMEDY}")
    values = colors[..., 0]
    if alpha is not None and alpha.min() < alpha.max() and ((alpha != 0) != (values != 0)).any():
        raise UserError(f"{path} has an alpha channel that disagrees with its values about the glands: {REMEDY}")
    return values


def _shows_zero_as_white(values: np.ndarray, image: Image.Image) -> bool:
    """Whether a palette shows 0 as white and the other values, or 1 if there are none, as black.

    Palettes of several colors number classes, and may show the background as white.
    """
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    others = np.unique(values[values != 0]) if values.any() else np.array([1])
    inside = others[others < len(palette)]
    return bool(len(palette) and (palette[0] == 255).all() and len(inside) and (palette[inside] == 0).all())
