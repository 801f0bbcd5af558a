"""Cache of decoded images: hits and misses, the file, damage and failures."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import assert_same, fail_if_decoding, flip
from forks import in_fork
from PIL import Image
from refusals import refused
from safetensors import safe_open

from semimoe_fast.data import cache, folders
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.folders import load_part
from semimoe_fast.errors import UserError

RNG = np.random.default_rng(0)
SIZE = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one part of three pairs, which differ in size from SIZE."""
    root = tmp_path / "data"
    for kind, shape in (("image", (20, 30, 3)), ("mask", (20, 30))):
        (root / "train" / kind).mkdir(parents=True)
        for name in ("1", "2", "10"):
            save(RNG.integers(0, 2 if kind == "mask" else 256, shape, np.uint8), root / "train" / kind / f"{name}.png")
    return root


@pytest.fixture
def cached(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "runs" / "cache")


def save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path)


def files(cached: Cache) -> list[Path]:
    """All files in the cache, including hidden ones."""
    return sorted(cached.folder.iterdir())


# -------------------------------------------------------------------------------------------------- hits and misses


def test_files_that_change_while_they_are_read_are_not_kept(
    root: Path, cached: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = root / "train" / "image" / "1.png"
    write = cache.Entry.write

    def write_and_change(*arguments: object) -> None:
        write(*arguments)
        save(np.zeros((20, 30, 3), np.uint8), image)

    before = image.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(cache.Entry, "write", write_and_change)
        with pytest.raises(UserError, match="files changed while they were read; start the command again"):
            cached.load_part(root, "train", SIZE, with_masks=True)
    assert files(cached) == []
    image.write_bytes(before)
    assert_same(cached.load_part(root, "train", SIZE, True), load_part(root, "train", SIZE, True))


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("size", [SIZE, 33])
def test_a_part_is_decoded_once(root: Path, cached: Cache, monkeypatch, capsys, size: int, with_masks: bool) -> None:
    expected = load_part(root, "train", size, with_masks)
    assert_same(cached.load_part(root, "train", size, with_masks), expected)
    fail_if_decoding(monkeypatch)
    assert_same(Cache(cached.folder).load_part(root, "train", size, with_masks), expected)
    assert len(files(cached)) == 1
    assert capsys.readouterr().err == ""


def test_a_moved_folder_is_found(root: Path, cached: Cache, tmp_path: Path, monkeypatch) -> None:
    expected = cached.load_part(root, "train", SIZE, True)
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    (moved / "train").rename(moved / "part")
    fail_if_decoding(monkeypatch)
    assert_same(cached.load_part(moved, "part", SIZE, True), expected)


def change_one(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    save(pixels, path)


def rename(root: Path) -> None:
    for kind in ("image", "mask"):
        (root / "train" / kind / "1.png").rename(root / "train" / kind / "3.png")


def add(root: Path) -> None:
    for kind in ("image", "mask"):
        shutil.copy(root / "train" / kind / "1.png", root / "train" / kind / "3.png")


def remove(root: Path) -> None:
    for kind in ("image", "mask"):
        (root / "train" / kind / "1.png").unlink()


def exchange(root: Path) -> None:
    """Swap two masks, so that the same images and masks form other pairs."""
    folder = root / "train" / "mask"
    (folder / "1.png").rename(folder / "other.png")
    (folder / "2.png").rename(folder / "1.png")
    (folder / "other.png").rename(folder / "2.png")


CHANGES = {
    "pixel of an image": lambda root: change_one(root / "train" / "image" / "2.png"),
    "pixel of a mask": lambda root: change_one(root / "train" / "mask" / "10.png"),
    "renamed": rename,
    "added": add,
    "removed": remove,
    "masks exchanged": exchange,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_decoded_again(root: Path, cached: Cache, change: str) -> None:
    before = cached.load_part(root, "train", SIZE, True)
    CHANGES[change](root)
    after = cached.load_part(root, "train", SIZE, True)
    assert_same(after, load_part(root, "train", SIZE, True))
    assert len(files(cached)) == 2
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("change", ["size", "masks", "format", "Pillow", "torch"])
def test_key_covers_everything_that_determines_the_values(root: Path, cached: Cache, monkeypatch, change: str) -> None:
    cached.load_part(root, "train", SIZE, True)
    if change == "format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    elif change == "Pillow":
        monkeypatch.setattr(cache.PIL, "__version__", "0")
    elif change == "torch":
        monkeypatch.setattr(cache.torch, "__version__", "0")
    arguments = 2 * SIZE if change == "size" else SIZE, change != "masks"
    assert_same(cached.load_part(root, "train", *arguments), load_part(root, "train", *arguments))
    assert len(files(cached)) == 2


# -------------------------------------------------------------------------------------------------------- the file


def test_file_is_safetensors(root: Path, cached: Cache) -> None:
    expected = cached.load_part(root, "train", SIZE, True)
    (path,) = files(cached)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        metadata = file.metadata()
    assert tensors.keys() == {"images", "masks"}
    assert torch.equal(tensors["images"], expected.images)
    assert torch.equal(tensors["masks"], expected.masks)
    assert metadata == {"key": path.stem, "names": '["1", "10", "2"]', "fingerprint": expected.fingerprint}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_of_a_large_part_are_mapped_and_the_file_is_safe_from_them(
    root: Path, cached: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_IN_MEMORY", 0)
    dataset = cached.load_part(root, "train", SIZE, True)
    (path,) = files(cached)
    before = path.read_bytes()
    (line,) = (
        line
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        if line.endswith(str(path))
    )
    begin, end = (int(address, 16) for address in line.split()[0].split("-"))
    for tensor in (dataset.images, dataset.masks):
        assert begin <= tensor.data_ptr() < end
        tensor += 1
    assert path.read_bytes() == before
    path.unlink()
    assert dataset.masks.max() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory there is")
def test_file_larger_than_memory_is_mapped(root: Path, cached: Cache) -> None:
    """The file has a header and, instead of pixels, a hole. Only mapping is tested, not reading."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this Linux does not map more than its memory")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (pair,) = folders.list_pairs(root, "train", False)[:1]
    side = 4096
    entry = cache.Entry([pair] * (2 * memory // (3 * side**2)), side, "0" * 64)
    cached.folder.mkdir(parents=True)
    path = cached.folder / "large"
    path.write_bytes(entry.header())
    try:
        os.truncate(path, len(entry.header()) + 3 * side**2 * len(entry.pairs))
    except OSError as error:
        pytest.skip(f"the file system does not take such a large file: {error}")
    assert entry.map(path).images[-1, -1, -1, -1] == 0


def test_file_that_changes_during_a_run_does_not_change_its_images(root: Path, cached: Cache) -> None:
    """Truncation under a mapping would kill the process, and so would a mapping here."""
    expected = load_part(root, "train", SIZE, True)
    for _ in ("decoded", "found"):
        dataset = cached.load_part(root, "train", SIZE, True)
        (path,) = files(cached)
        before = path.read_bytes()
        with path.open("r+b") as file:
            file.write(bytes(len(before)))
        assert_same(dataset, expected)
        os.truncate(path, 0)
        assert_same(dataset, expected)
        path.write_bytes(before)


def test_bus_error_of_a_truncated_large_part_is_not_silent(
    root: Path, cached: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_IN_MEMORY", 0)
    cached.load_part(root, "train", SIZE, True)  # not in the child: PyTorch may fail in new threads of a forked process

    def child() -> None:
        faulthandler.disable()  # that of pytest
        dataset = cached.load_part(root, "train", SIZE, True)
        os.truncate(*files(cached), 0)
        print(dataset.images[-1, -1, -1, -1])  # one pixel, as a forked process must not start OpenMP

    ended = in_fork(child)
    assert ended.status == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in ended.output


def test_unfinished_files_of_killed_processes_are_removed(root: Path, cached: Cache) -> None:
    cached.folder.mkdir(parents=True)
    abandoned, fresh = (cached.folder / f".{name}.safetensors.0123abcd.part" for name in ("abandoned", "fresh"))
    for part in (abandoned, fresh):
        part.touch()
    os.utime(abandoned, (0, time.time() - cache.ABANDONED - 60))
    cached.load_part(root, "train", SIZE, True)
    assert not abandoned.exists()
    assert fresh.exists()  # another process may be writing it


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "truncated": cut,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(RNG.bytes(path.stat().st_size)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit of the header": flip(20),
    "bit of a mask": flip(-5),
    "bit of an image": flip(-3 * SIZE**2 - 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_replaced(root: Path, cached: Cache, capsys, monkeypatch, damage: str) -> None:
    expected = load_part(root, "train", SIZE, True)
    cached.load_part(root, "train", SIZE, True)
    (path,) = files(cached)
    whole = path.read_bytes()
    DAMAGE[damage](path)
    assert_same(cached.load_part(root, "train", SIZE, True), expected)
    assert capsys.readouterr().err == f"warning: {path}: damaged; its images are decoded again\n"
    assert path.read_bytes() == whole
    fail_if_decoding(monkeypatch)
    assert_same(cached.load_part(root, "train", SIZE, True), expected)
    assert capsys.readouterr().err == ""


def test_file_renamed_to_another_key_is_refused(root: Path, cached: Cache, capsys) -> None:
    """Names and shapes are those of the other file."""
    cached.load_part(root, "train", SIZE, True)
    (path,) = files(cached)
    change_one(root / "train" / "image" / "2.png")
    cached.load_part(root, "train", SIZE, True)
    (other,) = set(files(cached)) - {path}
    path.replace(other)
    assert_same(cached.load_part(root, "train", SIZE, True), load_part(root, "train", SIZE, True))
    assert "damaged" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_kept(root: Path, cached: Cache, monkeypatch) -> None:
    for kind in ("image", "mask"):
        (root / "train" / kind / "1.png").rename(root / "train" / kind / os.fsdecode(b"\xe9.png"))
    expected = load_part(root, "train", SIZE, True)
    assert_same(cached.load_part(root, "train", SIZE, True), expected)
    fail_if_decoding(monkeypatch)
    assert_same(cached.load_part(root, "train", SIZE, True), expected)
    (path,) = files(cached)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["names"]) == ["10", "2", "\udce9"]


def test_warning_of_further_pages_appears_when_images_are_decoded(root: Path, cached: Cache, capsys) -> None:
    page = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    (root / "train" / "image" / "1.png").unlink()
    page.save(root / "train" / "image" / "1.tif", save_all=True, append_images=[page])
    cached.load_part(root, "train", SIZE, True)
    assert capsys.readouterr().err.count("1.tif has 2 pages") == 1


# --------------------------------------------------------------------------------------------------------- failures


def test_unusable_folder_only_warns_once(root: Path, cached: Cache, capsys) -> None:
    cached.folder.parent.mkdir()
    cached.folder.touch()  # a file in place of the folder; missing permissions would not stop root
    for size in (SIZE, 32):
        assert_same(cached.load_part(root, "train", size, True), load_part(root, "train", size, True))
    warning = f"warning: {cached.folder}: {os.strerror(errno.EEXIST)}; decoded images are not kept\n"
    assert capsys.readouterr().err == warning


def test_full_disk_leaves_no_file_behind(root: Path, cached: Cache, capsys, monkeypatch) -> None:
    def full(self, path: Path, title: str) -> None:
        path.write_bytes(self.header())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(cache.Entry, "write", full)
    assert_same(cached.load_part(root, "train", SIZE, True), load_part(root, "train", SIZE, True))
    assert files(cached) == []
    assert capsys.readouterr().err.endswith(f"{os.strerror(errno.ENOSPC)}; decoded images are not kept\n")


def test_bad_files_raise_the_same_errors_as_without_a_cache(root: Path, cached: Cache) -> None:
    image, mask = root / "train" / "image", root / "train" / "mask"
    cached.load_part(root, "train", SIZE, True)
    damages = [
        lambda: (mask / "1.png").unlink(),
        lambda: save(np.zeros((9, 9), np.uint8), mask / "1.png"),
        lambda: (image / "2.png").write_bytes(b"nothing to see"),
        lambda: ((image / "2.png").unlink(), (image / "2.png").mkdir()),  # open() fails
        lambda: shutil.rmtree(image),
    ]
    for damage in damages:
        damage()
        expected = refused(load_part, root, "train", SIZE, True)
        assert refused(cached.load_part, root, "train", SIZE, True) == expected
        assert len(files(cached)) == 1


def test_only_the_writing_process_of_a_run_writes(root: Path, cached: Cache, monkeypatch) -> None:
    other = Cache(cached.folder, writes=False)
    assert_same(other.load_part(root, "train", SIZE, True), load_part(root, "train", SIZE, True))
    assert not cached.folder.exists()
    expected = cached.load_part(root, "train", SIZE, True)
    fail_if_decoding(monkeypatch)
    assert_same(other.load_part(root, "train", SIZE, True), expected)


def test_two_runs_write_the_same_part_at_once(root: Path, cached: Cache, monkeypatch) -> None:
    """A second run writes the part completely while the first run is still writing it."""
    write = cache.Entry.write

    def interrupted(self, path: Path, title: str) -> None:
        monkeypatch.setattr(cache.Entry, "write", write)
        path.write_bytes(b"unfinished")
        Cache(cached.folder).load_part(root, "train", SIZE, True)
        assert path.read_bytes() == b"unfinished"
        write(self, path, title)

    monkeypatch.setattr(cache.Entry, "write", interrupted)
    assert_same(cached.load_part(root, "train", SIZE, True), load_part(root, "train", SIZE, True))
    assert len(files(cached)) == 1
