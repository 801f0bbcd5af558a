"""Cache of decoded images on disk: only the first run on the same image files decodes them.

CACHE/KEY.safetensors holds the result of `folders.load_part` or of `ragged.load_whole`. KEY is a digest of everything
that the result depends on, such as the names and bytes of the image files. So a cached file never becomes stale, and
moved images find it again.

A part of up to 1 GiB is read into memory, so that nothing that happens to its file afterwards reaches the run. A larger
part is memory-mapped: processes share the memory, and it may be larger than memory. Leave its file alone while a run
uses it: a program that writes into it changes the images, and one that truncates it kills the run by a bus error.
Python prints where; `--resume` continues from the last checkpoint.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from ..errors import UserError, warn
from ..files import write_atomically
from .folders import Dataset, Pair, in_threads, list_pairs, read_header, read_pair, read_pairs
from .ragged import Ragged, read_ragged, starts_of
from .readers import mpp_of
from .scaled import read_scaled, size_at

FORMAT = 3  # increase it when the decoded values or the file format change
DTYPES = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"}  # as safetensors names them
MOST_IN_MEMORY = 2**30  # bytes of a part that is not mapped
ABANDONED = 3600  # seconds without change after which an unfinished file is that of a killed process
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # older Pythons do not name this Linux flag


@dataclass
class Cache:
    """A folder of decoded parts, created when the first part is stored.

    If the cache cannot be used, one line on stderr says why, and the images are decoded into memory.
    """

    folder: Path
    writes: bool = True  # False in processes that leave writing to another, and after writing has failed

    def load_part(
        self, root: Path, part: str, size: int, with_masks: bool, instances: bool = False, antialias: bool = False
    ) -> Dataset:
        """Same values as `folders.load_part`; its errors, and UserError for files that change while they are read."""
        pairs = list_pairs(root, part, with_masks)
        return self._load(Entry(pairs, size, "", instances and with_masks, antialias), part)

    def load_whole(
        self, root: Path, part: str, with_masks: bool, instances: bool = False, mpp: float | None = None
    ) -> Ragged:
        """Same values as `ragged.load_whole`; its errors, and UserError for files that change while they are read."""
        pairs = list_pairs(root, part, with_masks)
        return self._load(RaggedEntry(pairs, None, "", instances and with_masks, mpp=mpp), part)

    def _load(self, entry: Entry, part: str) -> Any:
        """The decoded images of an entry whose key is yet unknown."""
        try:
            states = entry.states()
            entry = replace(entry, key=entry.key_of_files(f"{part}, looking for it in the cache"))
            entry.header()  # reads the headers of images of any size
        except (OSError, UserError):  # a file cannot be read: decoding raises the clear error
            return entry.decode(part)
        path = self.folder / f"{entry.key}.safetensors"
        dataset = self._find(entry, path)
        if dataset is None and self.writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_abandoned()
                write_atomically(path, lambda unfinished: _write(entry, unfinished, part, states), shared=True)
                dataset = entry.read(path)
            except OSError as error:
                self.writes = False
                warn(f"{error.filename or path}: {error.strerror or error}; decoded images are not kept")
        return entry.decode(part) if dataset is None else dataset

    def _remove_abandoned(self) -> None:
        """Remove unfinished files that killed processes have left behind."""
        for part in self.folder.glob(".*.safetensors.*.part"):
            with suppress(FileNotFoundError):  # another process removes or finishes it
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()

    def _find(self, entry: Entry, path: Path) -> Any:
        """The cached part, or None, with a warning if its file exists but is unusable."""
        try:
            if not path.is_file():
                return None
            dataset, reason = entry.read(path), "damaged"
        except OSError as error:
            dataset, reason = None, error.strerror or str(error)
        if dataset is None and self.writes:
            warn(f"{path}: {reason}; its images are decoded again")
        return dataset


def _write(entry: Entry, path: Path, part: str, states: list[tuple[int, int]]) -> None:
    """`Entry.write`. Raises UserError if the files are not in the states they had before the key was computed."""
    entry.write(path, part)
    if entry.states() != states:
        raise UserError(
            f"{entry.pairs[0].image.parent.parent}: files changed while they were read; start the command again"
        )


class Stored(NamedTuple):
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True)
class Entry:
    """One part of a data folder as a safetensors file. Its layout follows from the files and the other fields."""

    pairs: Sequence[Pair]
    size: int | None
    key: str
    instances: bool = False
    antialias: bool = False
    mpp: float | None = None  # microns a pixel at which images of any size are read

    def read(self, path: Path) -> Any:
        """Map the file; None if any bit differs from what `write` wrote. Raises OSError.

        The check reads all pixels to compute the fingerprint. A run needs the fingerprint for its checkpoints anyway,
        and no other check detects pixels that the disk has damaged.
        """
        start = len(self.header())
        if path.stat().st_size != start + max(stored.end for stored in self.layout.values()):
            return None
        dataset = self.map(path)
        with path.open("rb") as file:
            return dataset if dataset and file.read(start) == self.header(dataset.fingerprint) else None

    def write(self, path: Path, title: str) -> None:
        """Decode the images into the file, one image per thread. Errors: OSError, and those of the decoder."""
        start = len(self.header())

        def store(row: int) -> None:
            with path.open("r+b") as file:
                for name, offset, pixels in self.decoded(row):
                    file.seek(start + self.layout[name].begin + offset)
                    file.write(pixels)

        path.write_bytes(self.header())
        in_threads(store, range(len(self.pairs)), title)
        header = self.header(self.map(path).fingerprint)
        with path.open("r+b") as file:
            file.write(header)

    def states(self) -> list[tuple[int, int]]:
        """Size in bytes and time of change of each file. Raises OSError for missing files."""
        stats = [path.stat() for pair in self.pairs for path in pair if path is not None]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    @property
    def names(self) -> list[str]:
        return [pair.image.stem for pair in self.pairs]

    @property
    def mask_dtype(self) -> torch.dtype:
        return torch.int32 if self.instances else torch.uint8

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of the tensors by name."""
        count, size = len(self.pairs), self.size
        return {
            "images": (torch.uint8, (count, 3, size, size)),
            "masks": (self.mask_dtype, (count, size, size)),
        }

    def decode(self, title: str) -> Any:
        """The decoded images in memory."""
        return read_pairs(self.pairs, self.size, title, self.instances, self.antialias)

    def decoded(self, row: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """Decode one image: names of tensors, the bytes before it in each, and its values."""
        values = read_pair(self.pairs[row], self.size, self.instances, self.antialias)
        for name, tensor in zip(("images", "masks"), values, strict=True):
            if tensor is not None:
                yield name, row * tensor.nbytes, tensor.numpy()

    def dataset(self, tensors: Mapping[str, Tensor]) -> Any:
        """The dataset of mapped tensors by name; None if they contradict each other."""
        return Dataset(tensors["images"], tensors.get("masks"), self.names)

    def key_of_files(self, title: str) -> str:
        """Digest of everything that determines the decoded values and names. Raises OSError for unreadable files."""

        def digests(pair: Pair) -> list[str | None]:
            return [pair.image.stem, *(None if path is None else _digest(path) for path in pair)]

        decoders = [PIL.__version__, torch.__version__]  # pixels of JPEGs and resized images may differ by version
        variants = {"instance maps": self.instances, "antialias": self.antialias, f"{self.mpp} microns": self.mpp}
        content = [FORMAT, *decoders, self.size, in_threads(digests, self.pairs, title)]
        content += [name for name, wanted in variants.items() if wanted]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def layout(self) -> dict[str, Stored]:
        """The tensors by name, in the order of the file: larger types first, because they must be aligned."""
        shapes = {name: kind for name, kind in self.shapes.items() if name != "masks" or self.pairs[0].mask is not None}
        layout, end = {}, 0
        for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            layout[name] = Stored(dtype, shape, begin, end)
        return layout

    def header(self, fingerprint: str = "0" * 64) -> bytes:
        """The bytes of the file before the pixels. Their number does not depend on the fingerprint."""
        metadata = {"key": self.key, "fingerprint": fingerprint, "names": json.dumps(self.names)}
        header: dict[str, Any] = {"__metadata__": metadata}
        for name, (dtype, shape, begin, end) in self.layout.items():
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def map(self, path: Path) -> Any:
        """Read the tensors of the file, or map them. Writing to them changes a private copy, never the file.

        safe_open maps files too, but it reserves memory for private copies, and Linux refuses to reserve more than
        there is.
        """
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) <= MOST_IN_MEMORY:
                memory = bytearray(size)
                if file.readinto(memory) < size:
                    raise OSError(errno.EIO, "truncated while it was read", str(path))
                return self._tensors(memory)
            if not faulthandler.is_enabled():
                faulthandler.enable()  # a bus error, if the file is truncated later, says where it happened
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)
        return self._tensors(memory)

    def _tensors(self, memory: bytearray | mmap.mmap) -> Any:
        pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=len(self.header()))
        return self.dataset(
            {
                name: pixels[stored.begin : stored.end].view(stored.dtype).view(stored.shape)
                for name, stored in self.layout.items()
            }
        )


class RaggedEntry(Entry):
    """One part with images of any size. `size` is None; the file also holds the tensor `sizes`.

    The headers of the images give the place of each image in the file. EXIF orientation may exchange its sides, which
    the decoder knows, but does not change its area.
    """

    @cached_property
    def header_sizes(self) -> Tensor:
        if self.mpp is None:
            return torch.tensor([read_header(pair.image) for pair in self.pairs])
        return torch.tensor([size_at(image, read_header(image), mpp_of(image), self.mpp) for image, _ in self.pairs])

    @cached_property
    def starts(self) -> Tensor:
        return starts_of(self.header_sizes)

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        pixels = int(self.header_sizes.prod(1).sum())
        return {
            "sizes": (torch.int64, (len(self.pairs), 2)),
            "pixels": (torch.uint8, (pixels, 3)),
            "masks": (self.mask_dtype, (pixels,)),
        }

    def decode(self, title: str) -> Ragged:
        return read_ragged(self.pairs, title, self.instances, self.mpp)

    def decoded(self, row: int) -> Iterator[tuple[str, int, np.ndarray]]:
        pair, first = self.pairs[row], int(self.starts[row])
        image, mask = read_scaled(pair, self.instances, self.mpp)
        height, width = image.shape[:2]
        if height * width != (area := int(self.header_sizes[row].prod())):
            raise UserError(f"{pair.image} has {height * width} pixels but its header says {area}: save it as a PNG")
        yield "sizes", row * 16, np.array([height, width])
        yield "pixels", first * 3, image
        if mask is not None:
            yield "masks", first * mask.itemsize, mask

    def dataset(self, tensors: Mapping[str, Tensor]) -> Ragged | None:
        sizes = tensors["sizes"]
        if (sizes < 1).any() or not torch.equal(sizes.prod(1), self.header_sizes.prod(1)):
            return None
        return Ragged(tensors["pixels"], tensors.get("masks"), self.starts, sizes, self.names)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
