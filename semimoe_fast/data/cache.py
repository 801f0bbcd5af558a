"""Decoded images, kept on the disk: of all runs on the same files only the first decodes them.

CACHE/KEY.safetensors holds what `data.load_part` gives. KEY is the digest of all that this follows from, such as the
names and bytes of the image files: what is found is right, wherever the images now lie, and never expires. The tensors
are mapped, not read: processes share the memory, and a set may be larger than it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch

from ..checkpoint import write_atomically
from ..errors import warn
from .folders import Dataset, Pair, in_threads, list_pairs, read_pair, read_pairs

FORMAT = 2  # to be raised when the same files are decoded to other values, or stored in another way
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, which older Pythons do not name


@dataclass
class Cache:
    """A folder of decoded parts, created when the first is stored.

    It only ever saves time: whatever is wrong with it is told in one line on stderr, and the images are decoded.
    """

    folder: Path
    writes: bool = True  # not where another process of the run does, nor once it has failed

    def load_part(self, root: Path, part: str, size: int, with_masks: bool) -> Dataset:
        """As `data.load_part`: the same values, the same errors; the tensors are mapped from a file of the cache."""
        pairs = list_pairs(root, part, with_masks)
        try:
            entry = Entry(pairs, size, key_of(pairs, size, f"{part}, looking for it in the cache"))
        except OSError:  # a file that cannot be read: decoding says so better
            return read_pairs(pairs, size, part)
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
        return read_pairs(pairs, size, part) if dataset is None else dataset

    def _find(self, entry: Entry, path: Path) -> Dataset | None:
        try:
            if not path.is_file():
                return None
            dataset, reason = entry.read(path), "damaged"
        except OSError as error:
            dataset, reason = None, error.strerror or str(error)
        if dataset is None and self.writes:
            warn(f"{path}: {reason}; its images are decoded anew")
        return dataset


@dataclass(frozen=True)
class Entry:
    """A part as a safetensors file, of which all but the pixels is known beforehand."""

    pairs: Sequence[Pair]
    size: int
    key: str

    def read(self, path: Path) -> Dataset | None:
        """Map the file; None where it is not, to the last bit, what `write` wrote. Raises OSError.

        That takes a pass over all pixels. A run makes it anyway, because its checkpoints carry this fingerprint, and
        nothing else would ever tell of pixels that the disk has damaged.
        """
        start = len(self.header())
        if path.stat().st_size != start + sum(math.prod(shape) for shape in self.shapes.values()):
            return None
        dataset = self.map(path)
        with path.open("rb") as file:
            return dataset if file.read(start) == self.header(dataset.fingerprint) else None

    def write(self, path: Path, title: str) -> None:
        """Decode into the file, an image a thread at a time. Raises UserError as `read_pair` does, and OSError."""
        start = len(self.header())

        def store(row: int) -> None:
            image, mask = read_pair(self.pairs[row], self.size)
            with path.open("r+b") as file:
                file.seek(start + row * image.numel())
                file.write(image.numpy())
                if mask is not None:
                    file.seek(start + len(self.pairs) * image.numel() + row * mask.numel())
                    file.write(mask.numpy())

        path.write_bytes(self.header())
        in_threads(store, range(len(self.pairs)), title)
        header = self.header(self.map(path).fingerprint)
        with path.open("r+b") as file:
            file.write(header)

    @property
    def names(self) -> list[str]:
        return [pair.image.stem for pair in self.pairs]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        count, size = len(self.pairs), self.size
        masks = {} if self.pairs[0].mask is None else {"masks": (count, size, size)}
        return {"images": (count, 3, size, size)} | masks

    def header(self, fingerprint: str = "0" * 64) -> bytes:
        """The start of the file, up to the pixels; equally long for every fingerprint."""
        metadata = {"key": self.key, "fingerprint": fingerprint, "names": json.dumps(self.names)}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, shape in self.shapes.items():
            begin, end = end, end + math.prod(shape)
            header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def map(self, path: Path) -> Dataset:
        """The file's tensors. Whoever writes into them changes a copy of the page in memory, never the file.

        safe_open maps too, but has memory set aside for such copies, which Linux refuses for files larger than it.
        """
        with path.open("rb") as file:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)
        pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=len(self.header()))
        parts = pixels.split([math.prod(shape) for shape in self.shapes.values()])
        images, *masks = (part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True))
        return Dataset(images, masks[0] if masks else None, self.names)


def key_of(pairs: Sequence[Pair], size: int, title: str) -> str:
    """Digest of everything that decides on the decoded values and their names. Raises OSError for unreadable files."""

    def digests(pair: Pair) -> list[str | None]:
        return [pair.image.stem, *(None if path is None else _digest(path) for path in pair)]

    decoders = [PIL.__version__, torch.__version__]  # of another version a JPEG or a resized pixel may differ by one
    return hashlib.sha256(json.dumps([FORMAT, *decoders, size, in_threads(digests, pairs, title)]).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
