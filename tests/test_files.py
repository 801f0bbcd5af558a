"""Files that are written as a whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semimoe_fast.files import write_atomically, write_png, write_text


def write_and_die(path: Path, moment: str) -> None:
    """Replace a file, and kill this process while it writes, before it renames, or after it renames the file."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(part: Path) -> None:
        part.write_bytes(b"new" * 1000)
        if moment == "while writing":
            die()

    replace = Path.replace

    def replace_and_die(part: Path, target: Path) -> None:
        if moment == "before renaming":
            die()
        replace(part, target)
        die()

    Path.replace = replace_and_die
    write_atomically(path, write)


@pytest.mark.parametrize(
    ("moment", "left"),
    [("while writing", b"old"), ("before renaming", b"old"), ("after renaming", b"new" * 1000)],
)
def test_kill_while_saving_leaves_the_old_or_the_new_file(tmp_path: Path, moment: str, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            write_and_die(path, moment)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == left
    write_atomically(path, lambda part: part.write_bytes(b"again"))  # overwrites what the killed one left
    assert path.read_bytes() == b"again"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_texts_are_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "latin-1")
    (tmp_path / "other").write_text("é")
    assert (tmp_path / "other").read_bytes() == b"\xe9", "the default here is latin-1"
    write_text(tmp_path / "text", "é")
    assert (tmp_path / "text").read_bytes() == "é".encode()


@pytest.mark.parametrize(("shape", "dtype"), [((5, 7), np.uint8), ((5, 7, 3), np.uint8), ((5, 7), np.uint16)])
def test_images_are_kept(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)
    write_png(tmp_path / "image.png", pixels)
    assert np.array_equal(Image.open(tmp_path / "image.png"), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
