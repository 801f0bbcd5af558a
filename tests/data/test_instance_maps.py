"""Instance maps: ids stay the same from the file through resizing, augmentation and the cache; synthetic instances."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors import safe_open
from scipy import ndimage

from semimoe_fast.data import augment, cache, folders
from semimoe_fast.data.augment import Augmentation
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.folders import list_pairs, load_part, read_instances, read_labels, read_mask, resize_mask
from semimoe_fast.data.glands import _Frame, _Outline, _union, glands
from semimoe_fast.synthetic import Folder, write

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 5, (20, 30), np.uint8)
LARGE = 2**31 - 1  # float32 holds neither this id nor its neighbor exactly


def save(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one part of three pairs; the ids are large."""
    root = tmp_path / "data"
    for kind in ("image", "mask"):
        (root / "train" / kind).mkdir(parents=True)
    for name in ("1", "2", "3"):
        save(RNG.integers(0, 256, (20, 30, 3), np.uint8), root / "train" / "image" / f"{name}.png")
        save(
            RNG.choice(np.array([0, 1, LARGE - 1, LARGE], np.int32), (20, 30)), root / "train" / "mask" / f"{name}.tif"
        )
    return root


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("dtype", "suffix"), [("uint8", "png"), ("uint16", "png"), ("uint16", "tif"), ("int32", "tif")]
)
def test_ids_are_those_of_the_file(tmp_path: Path, dtype: str, suffix: str) -> None:
    ids = IDS.astype(dtype)
    ids[ids == 4] = np.iinfo(dtype).max
    path = save(ids, tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_labels(path), ids)
    instances = read_instances(path)
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances, ids)


def test_ids_in_equal_channels(tmp_path: Path) -> None:
    path = save(np.repeat(IDS[..., None], 3, 2), tmp_path / "a.png")
    np.testing.assert_array_equal(read_instances(path), IDS)


@pytest.mark.parametrize("foreground", [1, 7, 128, 255, 65535, True])
def test_mask_without_ids_is_split_into_components(tmp_path: Path, foreground: int) -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    stored = mask > 0 if foreground is True else (mask * foreground).astype(np.uint8 if foreground < 256 else np.uint16)
    instances = read_instances(save(stored, tmp_path / "a.png"))
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances, [[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [3, 3, 3, 3]])


def test_one_id_is_one_instance_although_its_parts_are_apart(tmp_path: Path) -> None:
    one = np.array([[7, 0, 7, 8]], np.uint8)
    np.testing.assert_array_equal(read_instances(save(one, tmp_path / "a.png")), one)


def test_empty_mask_has_no_instances(tmp_path: Path) -> None:
    assert not read_instances(save(np.zeros_like(IDS), tmp_path / "a.png")).any()


BAD = {
    "negative": (
        IDS.astype(np.int32) - 3,
        "a.tif",
        "has the id -3: number the instances from 1, and set background and ignored pixels to 0",
    ),
    "too many": (
        np.arange(257 * 256, dtype=np.int32).reshape(257, 256),
        "a.tif",
        "has 65791 different values, more than the 65535 ids of an instance map: threshold it if it holds gray values",
    ),
    "float": (IDS.astype(np.float32), "a.tif", "holds floating-point values: save it as a PNG of one channel"),
    "color": (RNG.integers(0, 9, (20, 30, 3), np.uint8), "a.png", "is a color image (mode RGB): save it as a PNG"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_instance_map_is_refused(tmp_path: Path, case: str) -> None:
    values, name, message = BAD[case]
    path = save(values, tmp_path / name)
    assert refused(read_instances, path).startswith(f"{path} {message}")
    if case in ("negative", "too many"):  # a mask may have any values
        np.testing.assert_array_equal(read_mask(path), values != 0)


# ------------------------------------------------------------------------------------------- resizing and augmentation


@pytest.mark.parametrize("size", [16, 33, 64])
def test_part_keeps_the_ids(root: Path, size: int) -> None:
    part = load_part(root, "train", size, with_masks=True, instances=True)
    assert part.masks.dtype == torch.int32
    for mask, pair in zip(part.masks, list_pairs(root, "train", True), strict=True):
        rows, columns = np.arange(size) * 20 // size, np.arange(size) * 30 // size
        np.testing.assert_array_equal(mask, np.array(Image.open(pair.mask))[np.ix_(rows, columns)])
    binary = load_part(root, "train", size, with_masks=True)
    assert torch.equal(binary.masks, (part.masks != 0).byte())
    assert part.fingerprint != binary.fingerprint


@pytest.mark.parametrize(("extent", "corner"), [(16, (0, 0)), (14, (0, 0)), (14, (2, 1)), (1, (15, 15))])
def test_every_augmentation_keeps_the_ids(extent: int, corner: tuple[int, int]) -> None:
    """All eight symmetries at once, after a crop that is resized to nearest pixels."""
    size, coins = 16, torch.tensor(list(product([False, True], repeat=3)))
    ids = torch.from_numpy(RNG.integers(LARGE - 300, LARGE, (size, size), np.int32))
    parameters = Augmentation(torch.tensor([corner] * 8), torch.full((8,), extent), coins[:, :2], coins[:, 2])
    images = torch.zeros(8, 3, size, size, dtype=torch.uint8)
    _, augmented = augment.resample(images, ids.expand(8, -1, -1), parameters, size)
    assert augmented.dtype == torch.int32
    (row, column), whole = corner, ids.numpy()
    crop = resize_mask(whole[row : row + extent, column : column + extent], size).numpy()
    for result, (rows, columns, transpose) in zip(augmented.numpy(), coins.tolist(), strict=True):
        expected = np.flip(crop, [axis for axis, flipped in enumerate((rows, columns)) if flipped])
        np.testing.assert_array_equal(result, expected.T if transpose else expected)


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("size", [16, 33])  # bytes before the second tensor: a multiple of 4, and an odd number
def test_cache_keeps_the_ids(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    cached = Cache(tmp_path / "cache")
    expected = load_part(root, "train", size, True, instances=True)
    first = cached.load_part(root, "train", size, True, instances=True)
    monkeypatch.setattr(folders, "read_instances", lambda path: pytest.fail(f"{path} is decoded again"))
    for part in (first, cached.load_part(root, "train", size, True, instances=True)):
        assert part.masks.dtype == torch.int32
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.masks, expected.masks)
        assert part.fingerprint == expected.fingerprint
    (path,) = cached.folder.iterdir()
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("masks"), expected.masks)
        assert torch.equal(file.get_tensor("images"), expected.images)


def test_cache_keeps_masks_and_instance_maps_apart(root: Path, tmp_path: Path) -> None:
    cached = Cache(tmp_path / "cache")
    for instances in (False, True, False, True):
        part = cached.load_part(root, "train", 16, True, instances)
        assert part.masks.dtype == (torch.int32 if instances else torch.uint8)
        assert torch.equal(part.masks, load_part(root, "train", 16, True, instances).masks)
    assert len(list(cached.folder.iterdir())) == 2
    cached.load_part(root, "train", 16, with_masks=False)
    cached.load_part(root, "train", 16, with_masks=False, instances=True)  # the same images
    assert len(list(cached.folder.iterdir())) == 3


def test_caches_of_masks_keep_their_key(root: Path) -> None:
    """Instance maps add something to the key, masks do not."""
    pairs = list_pairs(root, "train", True)
    files = [[p.image.stem, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in p)] for p in pairs]
    content = json.dumps([cache.FORMAT, PIL.__version__, torch.__version__, 16, files])
    assert cache.Entry(pairs, 16, "").key_of_files("key") == hashlib.sha256(content.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- synthetic glands


def test_synthetic_instances_are_the_glands_of_the_masks() -> None:
    images, masks = glands(12, 64, 0, weakly_stained=3)
    same, ids = glands(12, 64, 0, weakly_stained=3, instances=True)
    assert ids.dtype == torch.int32
    assert torch.equal(same, images)
    assert torch.equal((ids > 0).byte(), masks)
    glands_, components = (
        [len(image.unique()) - 1 for image in ids],
        [ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks.numpy()],
    )
    touching = sum(count > parts for count, parts in zip(glands_, components, strict=True))
    assert touching > 3, "too few images with glands that touch"


def test_pixel_belongs_to_the_gland_in_which_it_is_deepest() -> None:
    """Two discs of equal radii that overlap: the line halfway between their centers divides them."""
    frame = _Frame(50, 50, 50)
    centers = (0.35 + 0.5j, 0.6 + 0.5j)
    discs = [_Outline(center, (0.2, 0.2), 0.0, np.zeros(4, np.complex64)) for center in centers]
    depth, number = _union(discs, frame, np.zeros((50, 50), np.float32))
    away = np.abs(frame.points() - np.array(centers)[:, None, None])
    expected = np.where(away.min(0) < 0.2, 1 + away.argmin(0), 0)
    assert set(np.unique(expected)) == {0, 1, 2}
    clear = np.abs(away.min(0) - 0.2) > 1e-5  # elsewhere rounding decides
    clear &= np.abs(away[0] - away[1]) > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(number[clear], expected[clear])
    np.testing.assert_array_equal(number > 0, depth > 0)


def test_folder_of_synthetic_instances(tmp_path: Path) -> None:
    out = tmp_path / "glands"
    write(Folder(out, labeled=2, unlabeled=1, val=1, size=32, seed=5, instances=True))
    images, ids = glands(4, 32, 5, weakly_stained=2, instances=True)
    with Image.open(out / "val" / "mask" / "0000.png") as mask:
        assert mask.mode == "I;16"
    parts = [load_part(out, part, 32, True, instances=True) for part in ("train_sup_2", "val")]
    assert torch.equal(torch.cat([part.masks for part in parts]), ids[[0, 1, 3]])
    assert torch.equal(torch.cat([part.images for part in parts]), images[[0, 1, 3]])


def test_as_many_ids_as_16_bits_hold(tmp_path):
    ids = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ids).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_instances(tmp_path / "a.png"), ids)
