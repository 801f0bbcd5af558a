"""Checkpoints and files of other programs against the labeled files of a part, at the images' own size."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch.nn import functional

from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data import augment
from semimoe_fast.data.folders import list_pairs, load_part, read_image, resize_image
from semimoe_fast.errors import UserError
from semimoe_fast.evaluation import metrics, score_images
from semimoe_fast.evaluation.files import Evaluation, evaluate_files, evaluate_model
from semimoe_fast.evaluation.scoring import count_set
from semimoe_fast.inference.predictor import GATED
from semimoe_fast.model import SemiMoE

CPU = torch.device("cpu")
SIZES = ((30, 50), (45, 33))  # height, width
TOUCHING = np.zeros((20, 30), np.int32)  # three objects, two of which touch
TOUCHING[2:10, 2:10], TOUCHING[2:10, 10:20], TOUCHING[14:18, 3:9] = 1, 2, 7


@pytest.fixture
def model() -> SemiMoE:
    """A network whose probabilities are on both sides of 0.5."""
    torch.manual_seed(1)
    return SemiMoE(width=2).eval()


def preprocessing(size: int, instances: bool = False) -> Preprocessing:
    return Preprocessing(size, (0.5,) * 3, (0.25,) * 3, instances=instances)


def write_part(root: Path, sizes=SIZES) -> Path:
    """ROOT/val with one random image and one map of objects, many of which touch, of each size."""
    random = np.random.default_rng(0)
    for name, (height, width) in enumerate(sizes):
        image = random.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
        mask = random.integers(0, 9, (height // 5 + 1, width // 5 + 1), np.uint8)
        mask[mask > 5] = 0
        for kind, pixels in (("image", image), ("mask", mask)):
            path = root / "val" / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(path)
    return root


def write_maps(root: Path, prediction: np.ndarray, truth: np.ndarray, kind: str = "tif") -> Path:
    """ROOT/val with one image and its map, and ROOT/predictions with a map."""
    for name, pixels in {
        "val/image/a.png": np.full((*truth.shape, 3), 200, np.uint8),
        f"val/mask/a.{kind}": truth,
        f"predictions/a.{kind}": prediction,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def scored(root: Path) -> Evaluation:
    return evaluate_files(list_pairs(root, "val", with_masks=True), root / "predictions")


# -------------------------------------------------------------------------------------------------------- checkpoints


def gated(model: SemiMoE, path: Path) -> np.ndarray:
    """The probability of the gated mask, float32 (H, W), at the size of the file."""
    image, (_, mean, std, *_) = read_image(path), preprocessing(16)
    with torch.no_grad():
        output = model(augment.normalize(resize_image(image, 16)[None], mean, std))
    square = output.mask.softmax(1)[:, 1:2]
    return functional.interpolate(square, image.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()


def test_predictions_are_compared_at_the_size_of_the_files(model: SemiMoE, tmp_path: Path) -> None:
    pairs = list_pairs(write_part(tmp_path), "val", with_masks=True)
    found = evaluate_model(model, pairs, preprocessing(16), CPU)
    truths = [np.array(Image.open(pair.mask)) for pair in pairs]
    probabilities = [gated(model, pair.image) for pair in pairs]
    assert [mask.shape for mask in found.predictions] == list(SIZES)
    assert all(map(np.array_equal, found.predictions, [p > 0.5 for p in probabilities]))
    half, swept = found.variants
    assert (half.threshold, half.swept, swept.swept) == (0.5, False, True)
    for variant in found.variants:
        expected = score_images([p > np.float32(variant.threshold) for p in probabilities], truths)
        assert all(map(torch.equal, variant.scores, expected))


def test_swept_threshold_has_the_best_pooled_jaccard(model: SemiMoE, tmp_path: Path) -> None:
    pairs = list_pairs(write_part(tmp_path), "val", with_masks=True)
    found = evaluate_model(model, pairs, preprocessing(16), CPU)
    probabilities = [gated(model, pair.image) for pair in pairs]
    jaccard = [summed_jaccard([p > np.float32(t) for p in probabilities], found.truths) for t in metrics.THRESHOLDS]
    swept = found.variants[1]
    assert swept.threshold == metrics.THRESHOLDS[int(np.argmax(jaccard))] != 0.5
    assert swept.summary.pooled["jaccard"].value == max(jaccard)


def summed_jaccard(masks: list[np.ndarray], truths: list[np.ndarray]) -> float:
    pairs = [(mask, truth > 0) for mask, truth in zip(masks, truths, strict=True)]
    return sum((m & t).sum() for m, t in pairs) / sum((m | t).sum() for m, t in pairs)


def test_counts_equal_those_of_training_at_the_training_size(model: SemiMoE, tmp_path: Path) -> None:
    root = write_part(tmp_path, sizes=((32, 32), (32, 32)))
    found = evaluate_model(model, list_pairs(root, "val", with_masks=True), preprocessing(32), CPU)
    expected = count_set(model, load_part(root, "val", 32, with_masks=True), preprocessing(32), CPU, batch=1)
    assert found.counts.keys() == expected.keys()
    assert all(torch.equal(found.counts[name], expected[name]) for name in expected)
    assert found.variants[0].scores.pixel_counts.tolist() == expected[GATED][:, metrics.HALF].tolist()


@pytest.mark.parametrize("instances", [False, True])
def test_the_ring_is_compared_at_the_training_size(model: SemiMoE, tmp_path: Path, instances: bool) -> None:
    root, used = write_part(tmp_path), preprocessing(16, instances)
    found = evaluate_model(model, list_pairs(root, "val", with_masks=True), used, CPU)
    dataset = load_part(root, "val", 16, with_masks=True, instances=instances)
    expected = count_set(model, dataset, used, CPU, batch=1)
    assert torch.equal(found.counts["boundary expert"], expected["boundary expert"])
    assert not torch.equal(found.counts["mask expert"], expected["mask expert"])
    other = evaluate_model(model, found.pairs, preprocessing(16, not instances), CPU).counts
    assert [name for name in other if not torch.equal(found.counts[name], other[name])] == ["boundary expert"]


def test_precision_is_that_of_the_option(model: SemiMoE, tmp_path: Path) -> None:
    pairs = list_pairs(write_part(tmp_path, sizes=((64, 64),)), "val", with_masks=True)
    counts = {p: evaluate_model(model, pairs, preprocessing(64), CPU, p).counts for p in ("auto", "fp32", "bf16")}
    assert all(torch.equal(counts["auto"][name], counts["fp32"][name]) for name in counts["auto"])
    assert any(not torch.equal(counts["bf16"][name], counts["fp32"][name]) for name in counts["auto"])


def test_probabilities_that_are_not_finite_are_refused(model: SemiMoE, tmp_path: Path) -> None:
    pairs = list_pairs(write_part(tmp_path), "val", with_masks=True)
    with torch.no_grad():
        next(model.gating.parameters()).fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"^c\.safetensors gives .*0\.png probabilities that are not finite .*--precision"
    ):
        evaluate_model(model, pairs, preprocessing(16), CPU, source="c.safetensors")


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("dtype", "kind"), [("u1", "png"), ("<u2", "png"), ("u1", "tif"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")]
)
def test_ids_of_files_are_objects(tmp_path: Path, dtype: str, kind: str) -> None:
    scale = 1 if dtype == "u1" else 300
    labels = (scale * TOUCHING).astype(dtype)
    found = scored(write_maps(tmp_path, labels, labels, kind))
    assert found.variants[0].scores.object_counts.tolist() == [[3, 0, 0]]
    assert found.predictions[0].tolist() == (scale * TOUCHING).tolist()


def test_names_of_macos_pair_with_those_of_other_systems(tmp_path: Path) -> None:
    """It composes ü of two characters, others of one."""
    root = write_maps(tmp_path, TOUCHING, TOUCHING)
    for file, form in (("val/image/a.png", "NFC"), ("val/mask/a.tif", "NFD"), ("predictions/a.tif", "NFC")):
        (root / file).rename((root / file).with_stem(unicodedata.normalize(form, "drüse")))
    assert scored(root).names == [unicodedata.normalize("NFC", "drüse")]


def test_maps_that_are_too_long_for_distances_are_refused(tmp_path: Path) -> None:
    long = np.ones((1, 46_341), np.uint8)
    with pytest.raises(UserError, match=r"a.png is 46341 x 1 pixels, and distances are computed up to"):
        scored(write_maps(tmp_path, long, long, "png"))


def test_masks_are_split_into_components(tmp_path: Path) -> None:
    mask = np.where(TOUCHING > 0, 255, 0).astype(np.uint8)
    against_ids = scored(write_maps(tmp_path / "ids", mask, TOUCHING.astype(np.uint8)))
    assert against_ids.variants[0].scores.object_counts.tolist() == [[2, 0, 1]]  # two touch, so they are one
    against_mask = scored(write_maps(tmp_path / "mask", mask, mask))
    assert against_mask.variants[0].scores.object_counts.tolist() == [[2, 0, 0]]
    assert len(against_mask.variants) == 1
    assert against_mask.variants[0].threshold is None


def test_gray_values_are_not_ids(tmp_path: Path, capsys) -> None:
    random = np.random.default_rng(0)
    gray = random.integers(0, 4, TOUCHING.shape, np.uint8) * 80
    root = write_maps(tmp_path, gray, TOUCHING.astype(np.uint8), "png")
    scored(root)
    (line,) = (text for text in capsys.readouterr().err.splitlines() if "warning" in text)
    assert line.split("warning: ")[1].startswith(f"{root}/predictions/a.png looks like gray values or classes, not ids")
    parts = TOUCHING.copy()
    parts[:, 5], parts[:, 15] = 0, 0  # two objects of two parts
    scored(write_maps(tmp_path, parts.astype(np.uint8), TOUCHING.astype(np.uint8), "png"))
    assert "warning" not in capsys.readouterr().err


def remove(path: Path) -> None:
    path.unlink()


def add(path: Path) -> None:
    for name in ("b.png", "c.png"):
        Image.fromarray(TOUCHING.astype(np.uint8)).save(path.with_name(name))


def save(pixels: np.ndarray):
    return lambda path: Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("file", "spoil", "parts"),
    [
        ("predictions/a.tif", save(TOUCHING[:, :-1]), ["30 x 20", "predictions/a.tif is 29 x 20", "size of its image"]),
        ("val/mask/a.tif", save(TOUCHING[:-1]), ["30 x 20", "val/mask/a.tif is 30 x 19", "size of its image"]),
        (
            "predictions/a.tif",
            lambda path: path.rename(path.with_name("b.tif")),
            ["image/a.png has no prediction: add", "--part"],
        ),
        ("predictions/a.tif", add, ["predictions/b.png has no image: add", "or remove the prediction"]),
        ("predictions/a.tif", remove, ["predictions holds no image: put PNG or TIFF files there"]),
        ("predictions/a.tif", save(TOUCHING.astype(np.float32)), ["predictions/a.tif holds floating-point values"]),
        ("predictions/a.tif", save(TOUCHING - 2), ["predictions/a.tif has the id -2", "from 1, and set background"]),
        ("val/mask/a.tif", save(-TOUCHING), ["val/mask/a.tif has the id -7"]),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, file: str, spoil, parts: list[str]) -> None:
    spoil(write_maps(tmp_path, TOUCHING, TOUCHING) / file)
    message = refused(scored, tmp_path)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
