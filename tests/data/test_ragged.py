"""Images of any size: windows, reading, and their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from caches import fail_if_decoding, flip
from PIL import Image
from refusals import refused
from safetensors import safe_open

from semimoe_fast.data import cache
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.folders import channel_statistics
from semimoe_fast.data.ragged import Ragged, load_whole, mirrored, starts_of
from semimoe_fast.errors import UserError

RNG = np.random.default_rng(0)
SHAPES = {"1": (20, 30), "10": (7, 3), "2": (33, 16)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one part of three pairs of different sizes; the masks have ids."""
    root = tmp_path / "data"
    for kind, channels in (("image", (3,)), ("mask", ())):
        (root / "train" / kind).mkdir(parents=True)
        for name, shape in SHAPES.items():
            pixels = RNG.integers(0, 256 if channels else 4, (*shape, *channels), np.uint8)
            Image.fromarray(pixels).save(root / "train" / kind / f"{name}.png")
    return root


@pytest.fixture
def cached(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def assert_same(ours: Ragged, theirs: Ragged) -> None:
    for name in ("pixels", "starts", "sizes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.masks is None) == (theirs.masks is None)
    if ours.masks is not None:
        assert ours.masks.dtype == theirs.masks.dtype
        assert torch.equal(ours.masks, theirs.masks)
    assert ours.names == theirs.names
    assert ours.fingerprint == theirs.fingerprint


def test_images_and_masks_are_those_of_the_files(root: Path) -> None:
    part = load_whole(root, "train", with_masks=True, instances=True)
    assert part.names == sorted(SHAPES)
    assert len(part) == 3
    for index, name in enumerate(part.names):
        assert part.sizes[index].tolist() == list(SHAPES[name])
        np.testing.assert_array_equal(part.image(index), Image.open(root / "train" / "image" / f"{name}.png"))
        np.testing.assert_array_equal(part.mask(index), Image.open(root / "train" / "mask" / f"{name}.png"))
    some = part[1::2]
    assert some.names == ["10"]
    assert torch.equal(some.image(0), part.image(1))
    assert len({part.fingerprint, some.fingerprint, part[:2].fingerprint}) == 3


def test_statistics_are_those_of_all_pixels(root: Path) -> None:
    part = load_whole(root, "train", with_masks=False)
    mean, std = channel_statistics(part.pixels)
    np.testing.assert_allclose(mean, part.pixels.double().mean(0) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, part.pixels.double().std(0, correction=0) / 255, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_mirror_is_that_of_numpy(length: int) -> None:
    expected = np.pad(np.arange(length), 13, mode="symmetric")
    assert mirrored(torch.arange(-13, length + 13), torch.tensor(length)).tolist() == expected.tolist()


def test_windows_are_squares_of_the_mirrored_images(root: Path) -> None:
    part = load_whole(root, "train", with_masks=True, instances=True)
    rows = torch.tensor([2, 0, 1, 1, 0])
    corners = torch.tensor([[10, 3], [15, 25], [-20, -9], [1, 0], [-1, 14]])
    images, masks = part.windows(rows, corners, 24)
    margin = 60
    for image, mask, index, (top, left) in zip(images, masks, rows.tolist(), (corners + margin).tolist(), strict=True):
        padded = np.pad(part.image(index), ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
        expected = padded[top : top + 24, left : left + 24]
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
        padded = np.pad(part.mask(index), margin, mode="symmetric")
        np.testing.assert_array_equal(mask, padded[top : top + 24, left : left + 24])


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize(("with_masks", "instances"), [(True, False), (True, True), (False, False)])
def test_a_part_is_decoded_once(root: Path, cached: Cache, monkeypatch, capsys, with_masks, instances) -> None:
    expected = load_whole(root, "train", with_masks, instances)
    assert_same(cached.load_whole(root, "train", with_masks, instances), expected)
    fail_if_decoding(monkeypatch)
    assert_same(Cache(cached.folder).load_whole(root, "train", with_masks, instances), expected)
    (path,) = cached.folder.iterdir()
    assert capsys.readouterr().err == ""
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("sizes").tolist() == expected.sizes.tolist()
        assert torch.equal(file.get_tensor("pixels"), expected.pixels)


def test_resized_images_have_other_files_by_size_and_antialiasing(root: Path, cached: Cache) -> None:
    cached.load_whole(root, "train", True)
    whole = {path: path.read_bytes() for path in cached.folder.iterdir()}
    plain = cached.load_part(root, "train", 16, True)
    smooth = cached.load_part(root, "train", 16, True, antialias=True)
    assert len(list(cached.folder.iterdir())) == 3
    assert torch.equal(plain.masks, smooth.masks)
    assert not torch.equal(plain.images, smooth.images)
    assert all(path.read_bytes() == content for path, content in whole.items())


MASKS, PIXELS = 20 * 30 + 7 * 3 + 33 * 16, 3 * (20 * 30 + 7 * 3 + 33 * 16)
DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(RNG.bytes(path.stat().st_size)),
    "bit of the header": flip(20),
    "bit of a mask": flip(-5),
    "bit of an image": flip(-MASKS - 5),
    "bit of a size": flip(-MASKS - PIXELS - 8),
    "sides exchanged": lambda path: exchange_sides(path),
}


def exchange_sides(path: Path) -> None:
    """The areas stay the same."""
    content = bytearray(path.read_bytes())
    sizes = slice(len(content) - MASKS - PIXELS - 48, len(content) - MASKS - PIXELS)
    content[sizes] = np.frombuffer(content[sizes], np.int64).reshape(3, 2)[:, ::-1].tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_replaced(root: Path, cached: Cache, capsys, damage: str) -> None:
    expected = load_whole(root, "train", True)
    cached.load_whole(root, "train", True)
    (path,) = cached.folder.iterdir()
    whole = path.read_bytes()
    DAMAGE[damage](path)
    assert_same(cached.load_whole(root, "train", True), expected)
    assert capsys.readouterr().err == f"warning: {path}: damaged; its images are decoded again\n"
    assert path.read_bytes() == whole


def test_turned_photographs_keep_their_place(root: Path, cached: Cache) -> None:
    """EXIF orientation 6 exchanges the sides, which the header does not show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("image", "mask"):
        with Image.open(root / "train" / kind / "10.png") as image:
            image.save(root / "train" / kind / "10.png", exif=exif)
    part = cached.load_whole(root, "train", True)
    assert_same(part, load_whole(root, "train", True))
    assert part.sizes[1].tolist() == [3, 7]


def test_bad_files_raise_the_same_errors_as_without_a_cache(root: Path, cached: Cache) -> None:
    image, mask = root / "train" / "image", root / "train" / "mask"
    damages = [
        lambda: Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask / "1.png"),
        lambda: (image / "2.png").write_bytes((image / "2.png").read_bytes()[:60]),
        lambda: (image / "2.png").write_bytes(b"nothing to see"),
        lambda: ((image / "2.png").unlink(), (image / "2.png").mkdir()),
    ]
    for damage in damages:
        damage()
        expected = refused(load_whole, root, "train", True)
        assert refused(cached.load_whole, root, "train", True) == expected
        assert not list(cached.folder.iterdir() if cached.folder.exists() else [])


def test_header_of_another_size_is_refused(root: Path, cached: Cache, monkeypatch) -> None:
    monkeypatch.setattr(cache, "read_header", lambda path: (5, 5))
    with pytest.raises(UserError, match=r"1\.png has 600 pixels but its header says 25: save it as a PNG"):
        cached.load_whole(root, "train", True)


def test_starts_are_sums_of_the_areas_before() -> None:
    assert starts_of(torch.tensor([[2, 3], [1, 1], [5, 2]])).tolist() == [0, 6, 7]


def test_bytes_are_those_of_images_and_masks(root: Path) -> None:
    part = load_whole(root, "train", True)
    pixels = sum(height * width for height, width in SHAPES.values())
    assert part.nbytes == pixels * (3 + part.masks.element_size())
    part.masks = None
    assert part.nbytes == 3 * pixels
