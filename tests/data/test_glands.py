"""Synthetic glands: reproducible, not separable by color, and consistent with their masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from semimoe_fast import synthetic
from semimoe_fast.data.folders import load_part
from semimoe_fast.data.glands import glands, picture
from semimoe_fast.errors import UserError
from semimoe_fast.synthetic import Folder, write
from semimoe_fast.training.command_line import SYNTHETIC
from semimoe_fast.training.sources import synthetic_data

SIZE = 64


@pytest.fixture(scope="module")
def sample():
    return glands(40, SIZE, 0)


def test_shapes_and_types(sample):
    images, masks = sample
    assert images.shape == (40, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert masks.shape == (40, SIZE, SIZE)
    assert masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("size", [16, 37])
def test_any_size(size):
    images, masks = glands(2, size, 0)
    assert images.shape == (2, 3, size, size)
    assert masks.shape == (2, size, size)


def test_no_images():
    images, masks = glands(0, SIZE, 0)
    assert len(images) == len(masks) == 0


def test_image_depends_only_on_seed_and_index(sample):
    images, masks = glands(3, SIZE, 0)
    assert torch.equal(images, sample[0][:3])
    assert torch.equal(masks, sample[1][:3])
    other, _ = glands(3, SIZE, 1)
    later, later_masks = glands(2, SIZE, 0, first=1)
    assert torch.equal(later, images[1:])
    assert torch.equal(later_masks, masks[1:])
    different = [(a != b).any().item() for a in other for b in images]
    assert all(different)
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(
    ("count", "size", "seed", "first"), [(-1, 64, 0, 0), (1, 15, 0, 0), (1, 64, -1, 0), (1, 64, 0, -1)]
)
def test_bad_arguments(count, size, seed, first):
    with pytest.raises(ValueError, match=f"got {count}, {seed}, {first} and {size}"):
        glands(count, size, seed, first=first)


def test_pictures_have_whole_open_and_touching_glands(sample):
    _, masks = sample
    share = masks.float().mean().item()
    assert 0.25 < share < 0.5  # GlaS: about half
    border = masks[:, 0].any(1) | masks[:, -1].any(1) | masks[:, :, 0].any(1) | masks[:, :, -1].any(1)
    assert border.float().mean() > 0.8
    whole = touching = 0
    for mask in masks.numpy():
        labels, count = ndimage.label(mask)
        for rows, columns in ndimage.find_objects(labels):
            whole += rows.start > 0 and columns.start > 0 and rows.stop < SIZE and columns.stop < SIZE
        for index in range(1, count + 1):  # erosion separates glands that touch
            touching += ndimage.label(ndimage.binary_erosion(labels == index, iterations=2, border_value=1))[1] > 1
    assert whole > 40
    assert touching > 10


def test_outlines_show_in_the_picture(sample):
    """The palisade of nuclei just inside an outline is darker in red than the stroma just outside."""
    images, masks = sample
    clear = []
    for image, mask in zip(images.numpy(), masks.numpy() > 0, strict=True):
        inside = mask & ~ndimage.binary_erosion(mask, iterations=3, border_value=1)
        outside = ndimage.binary_dilation(mask, iterations=3) & ~mask
        clear.append(image[0][outside].mean() - image[0][inside].mean() > 10)
    assert np.mean(clear) > 0.9


def test_color_alone_does_not_separate_glands(sample):
    """The best linear function of color at its best threshold has a far lower Dice than a small network, 0.95."""
    images, masks = sample
    color = images.permute(0, 2, 3, 1).reshape(-1, 3).double()
    color = torch.cat([color, torch.ones(len(color), 1)], 1)
    truth = masks.flatten().double()
    score = color @ torch.linalg.lstsq(color, truth[:, None]).solution[:, 0]
    dice = [
        (2 * (score > t).double() @ truth / ((score > t).sum() + truth.sum())).item()
        for t in torch.arange(0.1, 0.7, 0.02)
    ]
    assert max(dice) < 0.75


def test_weak_stain_changes_only_the_colors_of_the_first_pictures(sample):
    images, masks = glands(6, SIZE, 0, weakly_stained=4)
    assert torch.equal(masks, sample[1][:6])
    assert torch.equal(images[4:], sample[0][4:6])
    # half the optical density, up to noise and blur
    weak, usual = (-(part[:4].double().clamp(1) / 255).log().mean((1, 2, 3)) for part in (images, sample[0]))
    assert torch.allclose(weak / usual, torch.full((4,), 0.5, dtype=torch.float64), atol=0.1), weak / usual


def test_labeled_part_of_a_run_is_weakly_stained():
    labeled, unlabeled, val = synthetic_data(replace(SYNTHETIC, synthetic=(2, 3, 1), image_size=32))
    images, _ = glands(6, 32, 0, weakly_stained=2)
    assert torch.equal(torch.cat([labeled.images, unlabeled.images, val.images]), images)


def test_training_part_of_a_run_has_the_pixels_of_the_largest_magnification():
    config = replace(SYNTHETIC, synthetic=(2, 3, 4), scale_jitter=1.5)
    *training, val = synthetic_data(config)
    assert [part.images.shape for part in training] == [(2, 3, 96, 96), (3, 3, 96, 96)]
    plain = synthetic_data(replace(config, scale_jitter=None))
    assert torch.equal(val.images, plain[2].images)
    assert [part.names for part in (*training, val)] == [part.names for part in plain]


def test_folder_holds_the_pictures(tmp_path):
    out = tmp_path / "data"
    write(Folder(out, labeled=2, unlabeled=1, val=1, size=32, seed=5))
    images, masks = glands(4, 32, 5, weakly_stained=2)
    assert sorted(path.name for path in out.iterdir()) == ["train_sup_2", "train_unsup_1", "val"]
    assert not (out / "train_unsup_1" / "mask").exists()
    labeled, unlabeled = load_part(out, "train_sup_2", 32, True), load_part(out, "train_unsup_1", 32, False)
    val = load_part(out, "val", 32, True)
    assert np.array(Image.open(out / "val" / "mask" / "0000.png")).max() == 255  # visible in any viewer
    assert torch.equal(torch.cat([labeled.images, unlabeled.images, val.images]), images)
    assert torch.equal(torch.cat([labeled.masks, val.masks]), masks[[0, 1, 3]])


def test_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"{out} exists.*choose another --out"):
            write(Folder(out))


def test_empty_parts_are_left_out(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    out = tmp_path / "new"
    arguments = ["--labeled", "1", "--unlabeled", "0", "--val", "1", "--size", "16"]
    monkeypatch.setattr("sys.argv", ["synthetic", "--out", str(out), *arguments])
    synthetic.main()
    assert sorted(path.name for path in out.iterdir()) == ["train_sup_1", "val"]
    line = f"train with: python -m semimoe_fast.train --data {out} --unlabeled none"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_square_pictures_are_those_of_glands():
    image, ids = picture((SIZE, SIZE), SIZE, 3, 1, weakly_stained=True)
    images, maps = glands(2, SIZE, 3, 2, instances=True)
    assert (image == images[1].numpy()).all()
    assert (ids == maps[1].numpy()).all()


def test_larger_pictures_hold_more_glands_of_the_same_size():
    """Twenty pictures of 4 units each: gland areas in pixels, of glands that do not touch the border."""
    unit = 32
    areas, shares = {}, {}
    for name, shape in (("square", (unit, unit)), ("wide", (unit, 4 * unit)), ("high", (4 * unit, unit))):
        maps = [picture(shape, unit, 0, index)[1] for index in range(20)]
        assert all(ids.shape == shape for ids in maps)
        shares[name] = np.mean([(ids > 0).mean() for ids in maps])
        inner = [np.setdiff1d(ids, np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])) for ids in maps]
        areas[name] = np.concatenate([[(ids == k).sum() for k in kept] for ids, kept in zip(maps, inner, strict=True)])
    for name in ("wide", "high"):
        assert len(areas[name]) > 3 * len(areas["square"])
        assert abs(shares[name] / shares["square"] - 1) < 0.3  # pictures differ widely
        assert 0.7 < np.median(areas[name]) / np.median(areas["square"]) < 1.8  # large ones are cut less often


def test_folder_of_mixed_sizes(tmp_path):
    folder = Folder(tmp_path / "a", labeled=3, unlabeled=2, val=1, size=32, sizes=(20, 70), seed=4)
    write(folder)
    write(replace(folder, out=tmp_path / "b"))
    files = sorted(path for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 3 + 3 + 2 + 1 + 1
    sizes = set()
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        with Image.open(path) as image:
            assert min(image.size) >= 20
            assert max(image.size) <= 70
            sizes.add(image.size)
    assert len(sizes) == 6
    for path in (tmp_path / "a" / "train_sup_3" / "mask").iterdir():
        with Image.open(path) as mask, Image.open(path.parents[1] / "image" / path.name) as image:
            assert mask.size == image.size


@pytest.mark.parametrize("sizes", [(15, 40), (50, 40)])
def test_sizes_out_of_range_are_refused(tmp_path, sizes):
    with pytest.raises(UserError, match="--sizes is"):
        write(Folder(tmp_path / "a", sizes=sizes))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": 10**9}, "--labeled is 1000000000: give 0 to 1000000"),
        ({"unlabeled": -1}, "--unlabeled is -1: give 0 to 1000000"),
        ({"size": 8}, "--size is 8: give 16 to 16384"),
        ({"size": 10**6}, "--size is 1000000: give 16 to 16384"),
        ({"sizes": (20, 10**6)}, "--sizes is 20 1000000: give MIN of at least 16, and MAX from MIN to 16384"),
        ({"seed": 2**64}, f"--seed is {2**64}: give 0 to {2**63 - 1}"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_drawn(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(Folder(tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


def test_sizes_go_from_min_to_max(tmp_path):
    shapes = {synthetic._shape(synthetic.Folder(tmp_path, sizes=(20, 22)), number) for number in range(200)}
    assert shapes == {(height, width) for height in (20, 21, 22) for width in (20, 21, 22)}
