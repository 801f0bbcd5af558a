"""Synthetic H&E glands: images and exact masks for training, tests and benchmarks without a data set.

A picture is generated in five steps. Random outlines of glands are drawn in a frame, the unit square of a square
picture. The distance of a pixel inside the outline (its depth) determines its tissue: stroma, epithelium or lumen.
Tissue and nuclei determine the amounts of hematoxylin and eosin. The Beer-Lambert law converts the two stains to
color. A microscope model adds blur and noise.

Segmentation is not trivial: stain, light and texture vary more between images than between gland and stroma within an
image. Glands touch each other and cross the border of the picture. The stroma also has pale holes (vessels, the edge of
the slide) and dense nuclei (lymphocytes). Only the arrangement, a palisade of nuclei around a lumen, marks a gland.

Unlabeled images help: the labeled images come from a laboratory that stains weakly, all other images from one that
stains normally. Only the unlabeled images show glands with the normal stain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator

# Optical densities (red, green, blue) of one unit of hematoxylin and of eosin, as in the purple slides of GlaS.
DENSITIES = np.array([[0.92, 1.38, 0.62], [0.24, 0.86, 0.28]])

WEAK_STAIN = 0.5
MARGIN = 0.2  # units around a gland beyond which no structure depends on the distance to it


def glands(
    count: int, size: int, seed: int, weakly_stained: int = 0, instances: bool = False, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the square pictures number `first` to `first + count - 1` of glands with their masks.

    Those with numbers below `weakly_stained` have half the stain. Returns images, uint8 (count, 3, size, size), and
    masks, uint8 0/1 (count, size, size), 1 on glands including the lumen; with `instances` int32 maps of the same
    glands: 0 is background, every gland has its own id. Where glands touch, a pixel belongs to the gland in which it is
    deepest. A picture depends only on seed, size, its number and its stain. Raises ValueError for count < 0, size < 16,
    seed < 0 or first < 0.
    """
    if min(count, seed, first) < 0 or size < 16:
        raise ValueError(
            f"glands need count, seed and first >= 0 and size >= 16; got {count}, {seed}, {first} and {size}"
        )
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.int32 if instances else torch.uint8)
    for index in range(count):
        image, ids = picture((size, size), size, seed, first + index, first + index < weakly_stained)
        images[index] = torch.from_numpy(image)
        masks[index] = torch.from_numpy(ids if instances else ids > 0)
    return images, masks


def picture(
    shape: tuple[int, int], unit: int, seed: int, index: int, weakly_stained: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture of any shape (H, W): image, uint8 (3, H, W), and instance map, int32 (H, W).

    unit: side in pixels, at least 16, of a square picture whose glands have the same size in pixels; a larger picture
    holds more glands. The picture depends only on the arguments.
    """
    rng = np.random.default_rng([seed, index])
    frame = _Frame(*shape, unit)
    scene = _Scene.arrange(rng, frame)
    stain = _stains(rng, scene, frame)
    return _photograph(rng, frame, stain, WEAK_STAIN if weakly_stained else 1.0), scene.ids


class _Frame(NamedTuple):
    """A picture of height x width pixels. Lengths are in units of `unit` pixels, the side of a square picture."""

    height: int
    width: int
    unit: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def extent(self) -> complex:
        """Width + i height in units."""
        return complex(self.width / self.unit, self.height / self.unit)

    @property
    def area(self) -> float:
        return self.extent.real * self.extent.imag

    def divided(self, cells: int) -> _Frame:
        """The same frame with `cells` pixels in a unit."""
        return _Frame(round(self.extent.imag * cells), round(self.extent.real * cells), cells)

    def points(self) -> np.ndarray:
        """Pixel centers as complex numbers x + iy in units, complex64 (H, W)."""
        x, y = ((np.arange(side, dtype=np.float32) + 0.5) / self.unit for side in (self.width, self.height))
        return x[None, :] + 1j * y[:, None]


# ---------------------------------------------------------------------------------------------------------- outlines


@dataclass(frozen=True)
class _Outline:
    """A closed curve around `center`: an ellipse whose radius is modulated by harmonics 2, 3, ... of the angle."""

    center: complex
    radii: tuple[float, float]
    angle: float
    harmonics: np.ndarray  # complex amplitudes relative to the radius

    @classmethod
    def random(
        cls, rng: Generator, extent: complex, radius: float, elongation: float, angle: float, irregularity: float
    ) -> _Outline:
        stretch = elongation**0.5
        amplitude = irregularity * rng.uniform(0.2, 1, 4) / np.arange(2, 6)
        return cls(
            center=complex(*rng.uniform(-0.1, [extent.real + 0.1, extent.imag + 0.1])),
            radii=(radius * stretch, radius / stretch),
            angle=angle,
            harmonics=amplitude * np.exp(2j * np.pi * rng.random(4)),
        )

    def surroundings(self, frame: _Frame) -> tuple[slice, slice]:
        """Rows and columns of a frame that hold the curve and MARGIN around it."""
        reach = max(self.radii) * (1 + np.abs(self.harmonics).sum()) + MARGIN
        low, high = self.center - reach * (1 + 1j), self.center + reach * (1 + 1j)

        def pixels(low: float, high: float, side: int) -> slice:
            start, stop = np.clip([int(low * frame.unit), int(high * frame.unit) + 1], 0, side)
            return slice(start, stop)

        return pixels(low.imag, high.imag, frame.height), pixels(low.real, high.real, frame.width)

    def depth(self, points: np.ndarray) -> np.ndarray:
        """First-order approximation of the signed distance to the curve, positive inside."""
        turned = (points - np.complex64(self.center)) * np.complex64(np.exp(-1j * self.angle))
        scaled = turned.real / self.radii[0] + 1j * turned.imag / self.radii[1]
        radius = np.sqrt(scaled.real**2 + scaled.imag**2) + np.float32(1e-6)
        direction = scaled / radius
        curve = np.ones_like(radius)
        power = direction
        for harmonic in self.harmonics.astype(np.complex64):
            power = power * direction
            curve += (harmonic * power).real
        slope = np.sqrt((direction.real / self.radii[0]) ** 2 + (direction.imag / self.radii[1]) ** 2)
        return (curve - radius) / (slope + np.float32(1e-6))


class _Canvas:
    """Places random outlines at least `clearance` apart. A negative clearance allows that much overlap."""

    def __init__(self, frame: _Frame) -> None:
        coarse = frame.divided(24)  # a coarse grid suffices for the clearance
        self.frame, self.points = coarse, coarse.points()
        self.covered = np.full(coarse.shape, -np.inf, np.float32)

    def place(self, propose: Callable[[], _Outline], attempts: int, most: int, clearance: float) -> list[_Outline]:
        placed: list[_Outline] = []
        for _ in range(attempts):
            if len(placed) == most:
                break
            outline = propose()
            near = outline.surroundings(self.frame)  # elsewhere its depth is below any clearance
            depth, covered = outline.depth(self.points[near]), self.covered[near]
            if (depth > 0).sum() > 0.006 * 24**2 and np.minimum(depth, covered).max() < -clearance:
                np.maximum(covered, depth, out=covered)
                placed.append(outline)
        return placed


@dataclass(frozen=True)
class _Scene:
    """Depths inside the outlines of each kind of structure, float32 (H, W), in units of the frame."""

    zoom: float  # magnification relative to the usual one
    ids: np.ndarray  # the number of the gland at each pixel from 1, 0 outside, int32 (H, W)
    depth: np.ndarray  # glands
    void: np.ndarray  # vessels and the edge of the slide: pale, but not glands
    follicle: np.ndarray  # lymphoid follicles: dense nuclei, but not glands

    @classmethod
    def arrange(cls, rng: Generator, frame: _Frame) -> _Scene:
        zoom = rng.uniform(0.85, 1.4)
        elongation, irregularity = float(rng.choice([1.2, 1.6, 2.8])), rng.uniform(0.1, 0.5)
        heading = rng.uniform(0, np.pi)
        radius = zoom * rng.uniform(0.09, 0.17)

        def gland() -> _Outline:
            return _Outline.random(
                rng,
                frame.extent,
                radius * rng.uniform(0.7, 1.4),
                elongation * rng.uniform(0.8, 1.25),
                heading + rng.normal(0, 0.25),
                irregularity,
            )

        def hole() -> _Outline:
            return _Outline.random(
                rng, frame.extent, rng.uniform(0.03, 0.1), rng.uniform(1, 2.5), rng.uniform(0, np.pi), 0.4
            )

        def several(number: int) -> int:
            """A number per unit of area, for the whole frame."""
            return round(number * frame.area)

        canvas = _Canvas(frame)
        edge = canvas.place(lambda: _slide_edge(rng, frame.extent), 1, 1, 0.0) if rng.random() < 0.2 else []
        tissue = canvas.place(gland, several(60), several(rng.integers(3, 25)), zoom * rng.uniform(-0.015, 0.03))
        follicles = canvas.place(hole, several(8), several(rng.integers(0, 3)), 0.02)
        vessels = canvas.place(hole, several(12), several(rng.integers(0, 5)), 0.02)

        ruffle = np.float32(0.004 * zoom) * _texture(rng, frame, 0.03 * zoom)
        (depth, ids), (void, _), (follicle, _) = (
            _union(outlines, frame, ruffle) for outlines in (tissue, edge + vessels, follicles)
        )
        return cls(zoom, ids, depth, void, follicle)


def _slide_edge(rng: Generator, extent: complex) -> _Outline:
    """The edge of the slide as a huge disc that covers one side of the picture."""
    direction = np.exp(2j * np.pi * rng.random())
    away = rng.uniform(2.25, 2.45) + max(extent.real, extent.imag) / 2 - 0.5
    return _Outline(extent / 2 + away * direction, (2.0, 2.0), 0.0, 0.02 * np.ones(4, np.complex64))


def _union(outlines: list[_Outline], frame: _Frame, ruffle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth inside the union of ruffled outlines, and the number of the deepest outline from 1, 0 where it is not > 0.

    Where two outlines overlap, the depth falls to 0 on the line between them, so each gland keeps its rim of nuclei.
    """
    points = frame.points()
    first, second = (np.full(points.shape, -1, np.float32) for _ in range(2))
    deepest = np.zeros(points.shape, np.int32)
    for number, outline in enumerate(outlines, 1):
        near = outline.surroundings(frame)
        depth = outline.depth(points[near]) + ruffle[near]
        deepest[near][depth > first[near]] = number
        second[near] = np.maximum(second[near], np.minimum(first[near], depth))
        first[near] = np.maximum(first[near], depth)
    depth = first - np.maximum(second, 0)
    return depth, np.where(depth > 0, deepest, 0)


# ------------------------------------------------------------------------------------------------------------ tissue


def _stains(rng: Generator, scene: _Scene, frame: _Frame) -> np.ndarray:
    """Amounts of hematoxylin and eosin at every pixel, float32 (2, H, W)."""
    soft = scene.zoom * rng.uniform(0.002, 0.006)  # half-width of tissue borders
    mottle, drift = _texture(rng, frame, 0.02 * scene.zoom), _texture(rng, frame, 0.12)
    wall = scene.zoom * rng.uniform(0.04, 0.085) * (1 + 0.2 * _texture(rng, frame, 0.06))  # height of the epithelium

    stain = _stroma(rng, scene, frame, mottle, drift)
    stain = _glands(rng, scene, frame, stain, mottle, wall, soft)
    stain = _vessels(rng, scene, stain, soft)
    stain[0] += rng.uniform(0.4, 0.8) * _nuclei(rng, scene, frame, drift, wall, soft)
    return stain


def _stroma(rng: Generator, scene: _Scene, frame: _Frame, mottle: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """Stain of the stroma: wavy fibers of varying density with gaps between them."""
    across = (frame.points() * np.exp(1j * rng.uniform(0, np.pi))).real / (scene.zoom * rng.uniform(0.03, 0.06))
    bend = rng.uniform(0.5, 1.5) * _texture(rng, frame, 0.08) + 0.25 * _texture(rng, frame, 0.02 * scene.zoom)
    fiber = np.sin(2 * np.pi * (across + bend)) * np.clip(0.5 + 0.5 * _texture(rng, frame, 0.07), 0, 1)
    gap = _step(fiber + mottle - rng.uniform(1.2, 2.8), 0.3)
    hematoxylin = rng.uniform(0.05, 0.2) + 0.05 * mottle + 0.05 * drift
    eosin = rng.uniform(0.45, 0.75) + rng.uniform(0.05, 0.3) * fiber + 0.12 * mottle + 0.12 * drift
    return np.stack([hematoxylin, eosin]).astype(np.float32) * (1 - 0.8 * gap)


def _glands(
    rng: Generator,
    scene: _Scene,
    frame: _Frame,
    stain: np.ndarray,
    mottle: np.ndarray,
    wall: np.ndarray,
    soft: float,
) -> np.ndarray:
    """Add the glands: cytoplasm, mucin in goblet cells above the nuclei, and a lumen with debris in the deep parts."""
    zoom, depth = scene.zoom, scene.depth
    gland, lumen = _step(depth, soft), _step(depth - wall, soft)
    stain = _mix(stain, rng.uniform(0.2, 0.5) + 0.06 * mottle, rng.uniform(0.3, 0.7) + 0.06 * mottle, gland)
    goblets = _scatter(rng, frame, zoom * 0.024, _band(depth, 0.45 * wall, wall) * float(rng.choice([0.0, 0.3, 0.8])))
    mucin = _stamp(frame, goblets, zoom * 0.011, zoom * 0.008, np.zeros(len(goblets)))
    stain = _mix(stain, 0.12, 0.08, 0.8 * mucin * gland)
    debris = _step(_texture(rng, frame, 0.02 * zoom) - rng.uniform(0.3, 2.5), 0.3)
    return _mix(stain, 0.04 + 0.3 * debris, 0.04 + 0.4 * debris, lumen)


def _vessels(rng: Generator, scene: _Scene, stain: np.ndarray, soft: float) -> np.ndarray:
    """Add vessels outside the glands: empty space with a muscular wall of random strength."""
    outside = 1 - _step(scene.depth, soft)
    muscle = _band(scene.void, -scene.zoom * rng.uniform(0.005, 0.03), 0) * outside
    stain[1] += rng.uniform(0, 0.4) * muscle
    return _mix(stain, 0.03, 0.03, _step(scene.void, soft) * outside)


def _nuclei(
    rng: Generator, scene: _Scene, frame: _Frame, drift: np.ndarray, wall: np.ndarray, soft: float
) -> np.ndarray:
    """Nuclei: a palisade at the base of the epithelium, a few in the stroma, many in the follicles."""
    zoom, depth = scene.zoom, scene.depth
    rows = rng.uniform(0.45, 0.75)
    palisade = _scatter(rng, frame, zoom * 0.016, rng.uniform(0.85, 1) * _band(depth, 0.06 * wall, rows * wall))
    inward = np.angle(np.gradient(depth, axis=1) + 1j * np.gradient(depth, axis=0))
    crowd = np.clip(rng.uniform(0, 0.22) + 0.1 * drift, 0.02, 1) + 0.8 * _step(scene.follicle, soft)
    stroma = _scatter(rng, frame, zoom * 0.02, crowd * (depth < -0.006 * zoom) * (scene.void < 0))
    along = _texture(rng, frame, 0.2)
    return np.maximum(
        _stamp(frame, palisade, zoom * 0.013, zoom * 0.0065, _at(frame, inward, palisade)),
        _stamp(frame, stroma, zoom * rng.uniform(0.007, 0.012), zoom * 0.006, _at(frame, along, stroma)),
    )


def _scatter(rng: Generator, frame: _Frame, spacing: float, density: np.ndarray) -> np.ndarray:
    """Random points, complex (N,), on a jittered grid of `spacing`, each kept with probability `density`."""
    cells = max(1, round(1 / spacing))
    grid = frame.divided(cells).points().ravel()
    points = grid + (rng.uniform(-0.45, 0.45, grid.shape) + 1j * rng.uniform(-0.45, 0.45, grid.shape)) / cells
    return points[rng.random(points.shape) < _at(frame, density, points)]


def _stamp(frame: _Frame, centers: np.ndarray, length: float, width: float, angles: np.ndarray) -> np.ndarray:
    """Soft ellipses of the given half-axes at centers (N,), turned by angles (N,): float32 (H, W) in [0, 1]."""
    softness, unit = 0.15, frame.unit
    reach = int(np.ceil((1 + 2 * softness) * max(length, width) * unit))
    offset = np.arange(-reach, reach + 1)
    columns = np.floor(centers.real * unit).astype(int)[:, None, None] + offset[None, None, :]
    rows = np.floor(centers.imag * unit).astype(int)[:, None, None] + offset[None, :, None]
    away = ((columns + 0.5 + 1j * (rows + 0.5)) / unit - centers[:, None, None]).astype(np.complex64)
    away = away * np.exp(-1j * angles).astype(np.complex64)[:, None, None]
    radius = np.sqrt((away.real / np.float32(length)) ** 2 + (away.imag / np.float32(width)) ** 2)
    columns, rows = np.broadcast_arrays(columns, rows)
    inside = (columns >= 0) & (columns < frame.width) & (rows >= 0) & (rows < frame.height)
    seen = inside & (radius < 1 + 2 * softness)
    field = np.zeros(frame.shape, np.float32)
    np.maximum.at(field, (rows[seen], columns[seen]), _step(1 - radius[seen], softness))
    return field


def _at(frame: _Frame, field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of a field (H, W) at points (N,)."""
    column, row = (
        np.clip((part * frame.unit).astype(int), 0, side - 1)
        for part, side in ((points.real, frame.width), (points.imag, frame.height))
    )
    return field[row, column]


def _texture(rng: Generator, frame: _Frame, scale: float) -> np.ndarray:
    """Gaussian random field of zero mean, unit variance and correlation length `scale`, float32 (H, W)."""
    field = _blur(rng.standard_normal(frame.shape, np.float32), scale * frame.unit)
    return (field - field.mean()) / field.std()


def _blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Periodic Gaussian blur with `sigma` in pixels over the last two axes."""
    height, width = field.shape[-2:]
    frequency = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None, :] ** 2
    response = np.exp(-2 * (np.pi * sigma) ** 2 * frequency).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(field) * response, (height, width)).astype(np.float32)


def _step(x: np.ndarray, softness: float) -> np.ndarray:
    """A smooth step from 0 (x << 0) to 1 (x >> 0)."""
    return 0.5 + 0.5 * np.tanh(x / softness)


def _band(depth: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    return ((depth > low) & (depth < high)).astype(np.float32)


def _mix(
    stain: np.ndarray, hematoxylin: np.ndarray | float, eosin: np.ndarray | float, cover: np.ndarray
) -> np.ndarray:
    """Blend the stain (2, H, W) with the two given amounts: replaced where `cover` is 1, kept where it is 0."""
    above = np.stack(np.broadcast_arrays(hematoxylin, eosin, cover)[:2])
    return (stain + cover * (above - stain)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ camera


def _photograph(rng: Generator, frame: _Frame, stain: np.ndarray, strength: float) -> np.ndarray:
    """The image of the stains, uint8 (3, H, W): Beer-Lambert law, uneven lamp, blur and noise."""
    strengths, hue = strength * np.exp(rng.normal(0, 0.1, (2, 1))), np.exp(rng.normal(0, 0.05, (2, 3)))
    density = np.tensordot(strengths * hue * DENSITIES, np.maximum(stain, 0), axes=(0, 0))  # (3, H, W)
    lamp = rng.uniform(0.9, 1.0, (3, 1, 1)) * (1 + 0.04 * _texture(rng, frame, 0.3))
    light = _blur((lamp * np.exp(-density)).astype(np.float32), rng.uniform(0.1, 1.0) * frame.unit / 160)
    light += rng.uniform(0.005, 0.03) * rng.standard_normal(light.shape, np.float32)
    return (255 * np.clip(light, 0, 1)).round().astype(np.uint8)
