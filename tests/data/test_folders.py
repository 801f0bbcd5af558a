"""Image folders: reading, and one clear line for every bad folder or file."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from semimoe_fast.data import folders
from semimoe_fast.data.folders import load_part, read_image, read_mask, resize_image, resize_mask
from semimoe_fast.errors import UserError

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
IDS = RNG.integers(0, 3, (20, 30), np.uint8)


@pytest.fixture
def root(tmp_path):
    """A data folder with one part of three pairs."""
    (tmp_path / "train" / "image").mkdir(parents=True)
    (tmp_path / "train" / "mask").mkdir()
    for name in ("1", "2", "10"):
        save(COLORS, tmp_path / "train" / "image" / f"{name}.tif")
        save(IDS, tmp_path / "train" / "mask" / f"{name}.png")
    return tmp_path


def save(array, path):
    Image.fromarray(array).save(path)
    return path


def deep_png(path, channels):
    """A color PNG with 16 bits per channel. OpenCV writes it, because Pillow cannot."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(path), RNG.integers(0, 2**16, (20, 30, channels), np.uint16))


# ------------------------------------------------------------------------------------------------------------- parts


def test_part_pairs_by_stem(root):
    for name in (".DS_Store", ".hidden.png", "Thumbs.db", "notes"):
        (root / "train" / "image" / name).write_bytes(b"nothing to see")
    (root / "train" / "image" / "folder").mkdir()
    os.mkfifo(root / "train" / "image" / "pipe")
    save(np.zeros_like(IDS), root / "train" / "mask" / "2.png")
    part = load_part(root, "train", 16, with_masks=True)
    assert len(part) == 3
    assert part.names == ["1", "10", "2"]
    assert part.images.shape == (3, 3, 16, 16)
    assert part.images.is_contiguous()
    assert part.masks.shape == (3, 16, 16)
    assert torch.equal(part.images[0], resize_image(COLORS, 16))
    assert torch.equal(part.masks[0], resize_mask((IDS > 0).astype(np.uint8), 16))
    assert not part.masks[2].any()


def test_unlabeled_part_ignores_masks(root):
    (root / "train" / "mask" / "1.png").write_bytes(b"broken")
    part = load_part(root, "train", 16, with_masks=False)
    assert part.masks is None
    assert len(part) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


def holding(array):
    return lambda path: save(array, path)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def renamed(name):
    return lambda path: path.rename(path.with_name(name))


def put_in_a_folder(folder):
    parts = list(folder.iterdir())
    (folder / "patient").mkdir()
    for path in parts:
        path.rename(folder / "patient" / path.name)


BAD_PARTS = {
    "image missing": ("image/1.tif", Path.unlink, ["mask/1.png", "no image", "image/1.png", "remove the mask"]),
    "mask missing": ("mask/1.png", Path.unlink, ["image/1.tif", "no mask", "mask/1.png", "remove the image"]),
    "two of a stem": ("image/1.png", holding(COLORS), ["image/1.png", "1.tif", "same stem", "rename"]),
    "two masks of a stem": ("mask/2.tif", holding(IDS), ["mask/2.png", "2.tif", "same stem", "rename"]),
    "sizes differ": (
        "mask/2.png",
        holding(IDS[:19]),
        ["image/2.tif", "30 x 20", "mask/2.png", "30 x 19", "size of its image"],
    ),
    "truncated image": ("image/10.tif", truncate, ["image/10.tif", "truncated", "replace"]),
    "no bytes": ("mask/10.png", lambda path: path.write_bytes(b""), ["mask/10.png", "cannot be read", "replace"]),
    "a mask with a suffix": ("mask/1.png", renamed("1_anno.png"), ["image/1.tif", "rename 1_anno.png to 1.png"]),
    "the mask of another image": ("mask/1.png", renamed("11.png"), ["image/1.tif", "no mask", "add", "mask/1.png"]),
    "images in folders": ("image", put_in_a_folder, ["train/image", "no image", "image/patient, are not searched"]),
    "no images": ("image", empty, ["train/image", "no image", "put PNG"]),
    "no masks": ("mask", empty, ["train/mask", "no image", "put PNG"]),
    "no image folder": ("image", shutil.rmtree, ["train/image is missing", "train has mask", "add or rename"]),
    "no mask folder": ("mask", shutil.rmtree, ["train/mask is missing", "train has image", "add or rename"]),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_part(root, case):
    path, spoil, parts = BAD_PARTS[case]
    spoil(root / "train" / path)
    assert_parts(refused(load_part, root, "train", 16, with_masks=True), [str(root), *parts])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "named pipe"),
        (Path.mkdir, "folder"),
        (lambda path: path.symlink_to("nowhere"), "broken link"),
        (lambda path: path.symlink_to("/dev/zero"), "device or a socket"),
    ],
)
def test_only_regular_files_are_read(root, make, kind):
    """Reading a named pipe would wait forever."""
    path = root / "train" / "image" / "9.png"
    make(path)
    assert (
        refused(load_part, root, "train", 16, with_masks=True)
        == f"{path} is not a file but a {kind}: remove or rename it"
    )


def test_a_file_that_may_not_be_read(root, monkeypatch):
    path = root / "train" / "image" / "1.tif"
    opened = Path.open

    def open_others(self, *arguments):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", open_others)
    for read in (folders.read_header, folders.read_image, lambda _: load_part(root, "train", 16, with_masks=True)):
        assert refused(read, path) == f"{path}: you may not read it; change its permissions"


def test_image_of_one_pixel(root):
    for path in (root / "train" / "image").iterdir():
        save(COLORS[:1, :1], path)
        save(IDS[:1, :1] * 0 + 1, root / "train" / "mask" / f"{path.stem}.png")
    part = load_part(root, "train", 16, with_masks=True)
    assert (part.images == torch.from_numpy(COLORS[0, 0])[:, None, None]).all()
    assert part.masks.all()


def test_unknown_part_names_the_others(root):
    (root / "val" / "image").mkdir(parents=True)
    assert_parts(
        refused(load_part, root, "test", 16, with_masks=False),
        [str(root / "test" / "image"), "missing", "has the parts train, val", "another part"],
    )


def test_missing_root(tmp_path):
    assert_parts(
        refused(load_part, tmp_path / "nowhere", "train", 16, with_masks=False),
        [str(tmp_path / "nowhere"), "not a folder", "correct the path"],
    )


def assert_parts(line: str, parts: list[str]) -> None:
    assert [part for part in parts if part not in line] == []


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_image_is_read_as_it_is(tmp_path, suffix):
    np.testing.assert_array_equal(read_image(save(COLORS, tmp_path / f"a.{suffix}")), COLORS)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_image_is_converted_to_rgb(tmp_path, mode):
    image = Image.fromarray(COLORS).convert(mode)
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), image.convert("RGB"))


def test_alpha_is_dropped(tmp_path):
    transparent = np.dstack([COLORS, np.zeros_like(IDS)])
    np.testing.assert_array_equal(read_image(save(transparent, tmp_path / "a.png")), COLORS)


def test_sixteen_bits_per_pixel_is_not_sixteen_per_channel(tmp_path):
    """A BMP with 5-6-5 bits per channel, whose raw mode in Pillow is BGR;16."""
    header = b"BM" + (14 + 40 + 12 + 4).to_bytes(4, "little") + bytes(4) + (14 + 40 + 12).to_bytes(4, "little")
    info = [40, 1, 1, 1 | 16 << 16, 3, 4, 0, 0, 0, 0]  # 1 x 1 pixel, 1 plane, 16 bits, then the bit masks of channels
    masks = [0xF800, 0x07E0, 0x001F]
    (tmp_path / "a.bmp").write_bytes(
        header + b"".join(value.to_bytes(4, "little") for value in info + masks) + b"\x00\xf8\x00\x00"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.bmp"), [[[255, 0, 0]]])


DEEP = {"16-bit": np.uint16, "32-bit": np.int32, "float": np.float32}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_image_is_refused(tmp_path, kind):
    path = save(IDS.astype(DEEP[kind]), tmp_path / "a.tif")
    assert_parts(refused(read_image, path), [str(path), "more than 8 bits per channel", "save it as 8-bit RGB"])


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_color_is_refused(tmp_path, channels, suffix):
    path = tmp_path / f"a.{suffix}"
    deep_png(path, channels)
    assert_parts(refused(read_image, path), [str(path), "more than 8 bits per channel", "save it as 8-bit RGB"])


MASKS = {
    "0 and 255": Image.fromarray(255 * (IDS > 0).astype(np.uint8)),
    "ids": Image.fromarray(IDS),
    "1-bit": Image.fromarray(IDS > 0),
    "16-bit ids": Image.fromarray(IDS.astype(np.uint16) * 256),
    "32-bit ids": Image.fromarray(IDS.astype(np.int32) * 65536),
    "equal channels": Image.fromarray(np.repeat(IDS[..., None], 3, 2)),
    "equal channels, opaque": Image.fromarray(np.dstack([IDS, IDS, IDS, np.full_like(IDS, 255)])),
    "gray, opaque": Image.fromarray(np.dstack([IDS, np.full_like(IDS, 255)])),
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_is_non_zero(tmp_path, kind):
    MASKS[kind].save(tmp_path / "a.tif")
    mask = read_mask(tmp_path / "a.tif")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, IDS > 0)


def test_palette_mask_is_its_indices(tmp_path):
    image = Image.new("P", (30, 20))
    image.putdata(IDS.ravel().tolist())
    image.putpalette([9, 9, 9, 0, 0, 0, 250, 10, 80])  # 0 is not black and 1 is
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), IDS > 0)


def test_colored_mask_is_refused(tmp_path):
    path = save(COLORS, tmp_path / "a.png")
    assert_parts(refused(read_mask, path), [str(path), "color image (mode RGB)", "one channel"])


def test_deep_color_mask_is_refused(tmp_path):
    """Pillow keeps only the high bytes of such ids, so the channels stay equal but most ids become 0."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.png"), np.repeat(IDS[..., None], 3, 2).astype(np.uint16))
    assert_parts(refused(read_mask, tmp_path / "a.png"), [str(tmp_path / "a.png"), "color image", "one channel"])


def test_float_mask_is_refused(tmp_path):
    path = save(IDS.astype(np.float32), tmp_path / "a.tif")
    assert_parts(refused(read_mask, path), [str(path), "floating-point", "one channel"])


ORIENTATIONS = {  # EXIF tag -> function that turns the stored pixels upright
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_and_masks_are_turned_upright(tmp_path, suffix, orientation):
    for stored, read in ((COLORS, read_image), (IDS, read_mask)):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif)
        expected = ORIENTATIONS[orientation](stored if stored is COLORS else IDS > 0)
        np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), expected)


def test_turned_jpeg_mask_is_still_refused(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(IDS).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(UserError, match="is compressed as JPEG"):
        read_mask(tmp_path / "a.jpg")


def test_image_with_damaged_exif_is_read_as_it_is(tmp_path, capsys):
    Image.fromarray(COLORS).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLORS)
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'a.png'}: its EXIF data cannot be read")


def test_first_of_several_pages_is_read_with_a_warning(tmp_path, capsys):
    path = tmp_path / "a.tif"
    Image.fromarray(COLORS).save(path, save_all=True, append_images=[Image.fromarray(COLORS[::-1])] * 2)
    np.testing.assert_array_equal(read_image(path), COLORS)
    warning = f"warning: {path} has 3 pages, and only the first is used: save the others as separate files\n"
    assert capsys.readouterr().err == warning


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # Pillow's own about the damaged page
def test_first_page_is_read_if_the_second_is_damaged(tmp_path, capsys):
    path = tmp_path / "a.tif"
    Image.fromarray(COLORS).save(path, save_all=True, append_images=[Image.fromarray(COLORS)])
    content = path.read_bytes()
    first = int.from_bytes(content[4:8], "little")  # the file offset of the directory of the first page
    next_offset = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    second = int.from_bytes(content[next_offset : next_offset + 4], "little")
    path.write_bytes(content[: second + 10])
    np.testing.assert_array_equal(read_image(path), COLORS)
    assert capsys.readouterr().err.startswith(f"warning: {path}: pages after the first cannot be read (")


def test_fingerprint_covers_names_that_are_not_utf8(root):
    """The fingerprint of UTF-8 names is a fixed formula, and other names change it."""
    before = load_part(root, "train", 16, with_masks=False)
    content = hashlib.sha256(b"1\n10\n2" + before.images.numpy().tobytes()).hexdigest()
    assert before.fingerprint == content
    path = root / "train" / "image" / "1.tif"
    path.rename(path.with_name(os.fsdecode(b"\xe9.tif")))
    after = load_part(root, "train", 16, with_masks=False)
    assert after.names == ["10", "2", "\udce9"]
    assert after.fingerprint != before.fingerprint


# ---------------------------------------------------------------------------------------------------- memory of large


def test_large_images_are_decoded_one_at_a_time(root, monkeypatch):
    """A PNG of 20 KB may have 13,000 x 13,000 pixels, and threads would decode several of them together."""
    at_once, most, decode = [0], [0], folders.read_image

    def counted(path):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        image = decode(path)
        at_once[0] -= 1
        return image

    monkeypatch.setattr(folders, "read_image", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    load_part(root, "train", 16, with_masks=True)
    assert most[0] > 1
    monkeypatch.setattr(folders, "LARGE", 20 * 30 - 1)
    most[0] = 0
    load_part(root, "train", 16, with_masks=True)
    assert most[0] == 1
