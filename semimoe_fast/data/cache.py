"""Cache of decoded images on disk: only the first run on the same image files decodes them.

CACHE/KEY.safetensors holds the result of `folders.load_part`. KEY is a digest of everything that the result depends on,
such as the names and bytes of the image files. So a cached file never becomes stale, and moved images find it again.
The tensors are memory-mapped: processes share the memory, and a part may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch

from ..checkpoint import write_atomically
from ..errors import warn
from .folders import Dataset, Pair, in_threads, list_pairs, read_pair, read_pairs

FORMAT = 2  # increase it when the decoded values or the file format change
NAMES = ("images", "masks")
DTYPES = {torch.uint8: "U8", torch.int32: "I32"}  # as safetensors names them
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # older Pythons do not name this Linux flag


@dataclass
class Cache:
    """A folder of decoded parts, created when the first part is stored.

    If the cache cannot be used, one line on stderr says why, and the images are decoded into memory.
    """

    folder: Path
    writes: bool = True  # False in processes that leave writing to another, and after writing has failed

    def load_part(self, root: Path, part: str, size: int, with_masks: bool, instances: bool = False) -> Dataset:
        """Same values and errors as `folders.load_part`; the tensors are memory-mapped from the cache."""
        pairs = list_pairs(root, part, with_masks)
        instances = instances and with_masks  # images without masks are the same with either kind of mask
        try:
            key = key_of(pairs, size, f"{part}, looking for it in the cache", instances)
        except OSError:  # a file cannot be read: decoding raises the clear error
            return read_pairs(pairs, size, part, instances)
        entry = Entry(pairs, size, key, instances)
        path = self.folder / f"{entry.key}.safetensors"
        dataset = self._find(entry, path)
        if dataset is None and self.writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda unfinished: entry.write(unfinished, part), shared=True)
                dataset = entry.read(path)
            except OSError as error:
                self.writes = False
                warn(f"{error.filename or path}: {error.strerror or error}; decoded images are not kept")
        return read_pairs(pairs, size, part, instances) if dataset is None else dataset

    def _find(self, entry: Entry, path: Path) -> Dataset | None:
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


class Stored(NamedTuple):
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True)
class Entry:
    """One part of a data folder as a safetensors file. Its layout follows from the files, the size and the key."""

    pairs: Sequence[Pair]
    size: int
    key: str
    instances: bool = False

    def read(self, path: Path) -> Dataset | None:
        """Map the file; None if any bit differs from what `write` wrote. Raises OSError.

        The check reads all pixels to compute the fingerprint. A run needs the fingerprint for its checkpoints anyway,
        and no other check detects pixels that the disk has damaged.
        """
        start = len(self.header())
        if path.stat().st_size != start + max(stored.end for stored in self.layout.values()):
            return None
        dataset = self.map(path)
        with path.open("rb") as file:
            return dataset if file.read(start) == self.header(dataset.fingerprint) else None

    def write(self, path: Path, title: str) -> None:
        """Decode the images into the file, one image per thread. Errors: OSError, and those of `read_pair`."""
        start = len(self.header())

        def store(row: int) -> None:
            with path.open("r+b") as file:
                for name, tensor in zip(NAMES, read_pair(self.pairs[row], self.size, self.instances), strict=True):
                    if tensor is not None:
                        file.seek(start + self.layout[name].begin + row * tensor.nbytes)
                        file.write(tensor.numpy())

        path.write_bytes(self.header())
        in_threads(store, range(len(self.pairs)), title)
        header = self.header(self.map(path).fingerprint)
        with path.open("r+b") as file:
            file.write(header)

    @property
    def names(self) -> list[str]:
        return [pair.image.stem for pair in self.pairs]

    @cached_property
    def layout(self) -> dict[str, Stored]:
        """The tensors by name, in the order of the file. Ids are first, because int32 must be aligned."""
        count, size = len(self.pairs), self.size
        images = {"images": (torch.uint8, (count, 3, size, size))}
        masks = {"masks": (torch.int32 if self.instances else torch.uint8, (count, size, size))}
        tensors = masks | images if self.instances else images | masks
        if self.pairs[0].mask is None:
            tensors = images
        layout, end = {}, 0
        for name, (dtype, shape) in tensors.items():
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

    def map(self, path: Path) -> Dataset:
        """Map the tensors of the file. Writing to them changes a private copy in memory, never the file.

        safe_open maps files too, but it reserves memory for private copies, and Linux refuses to reserve more than
        there is.
        """
        with path.open("rb") as file:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)
        pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=len(self.header()))
        images, masks = (
            pixels[stored.begin : stored.end].view(stored.dtype).view(stored.shape) if stored else None
            for stored in map(self.layout.get, NAMES)
        )
        return Dataset(images, masks, self.names)


def key_of(pairs: Sequence[Pair], size: int, title: str, instances: bool = False) -> str:
    """Digest of everything that determines the decoded values and names. Raises OSError for unreadable files."""

    def digests(pair: Pair) -> list[str | None]:
        return [pair.image.stem, *(None if path is None else _digest(path) for path in pair)]

    decoders = [PIL.__version__, torch.__version__]  # pixels of JPEG files and resized images may differ by version
    content = [FORMAT, *decoders, size, in_threads(digests, pairs, title), *(["instance maps"] if instances else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
