"""`python -m semimoe_fast.export`: the file predicts as the checkpoint does, says what it is, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from semimoe_fast import checkpoint, export, predict
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.augment import normalize
from semimoe_fast.data.folders import read_image
from semimoe_fast.data.glands import glands
from semimoe_fast.data.listing import list_images
from semimoe_fast.inference import exporting, predictor
from semimoe_fast.model import Output, SemiMoE

pytest.importorskip("tyro", reason="commands read their options with tyro")

PREPROCESSING = Preprocessing(64, (0.75, 0.55, 0.7), (0.2, 0.25, 0.15), mpp=0.5)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NEEDS_ONNX = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="needs ONNX: pip install 'semimoe_fast[export]'"
)
FORMATS = [pytest.param("pt2", id="pt2"), pytest.param("onnx", id="onnx", marks=NEEDS_ONNX)]

# Outputs differ by float32 rounding through 28 layers, 4e-6 here. The bound leaves room for other CPUs.
ROUNDING = 1e-4


def images_of(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return glands(count, size, seed)[0]


def save_model(path: Path, tasks: tuple[str, ...] = ("mask", "sdf", "boundary")) -> Path:
    """A checkpoint with random weights whose BN has the statistics of images, not the 0 and 1 of a new network."""
    torch.manual_seed(1)
    model = SemiMoE(width=2, expert_tasks=tasks).train()
    x = normalize(images_of(4, 64), PREPROCESSING.mean, PREPROCESSING.std)
    with torch.no_grad():
        for _ in range(20):
            model(x)
        if "mask" in tasks:  # about half of the pixels are foreground
            logits = model.eval()(x).mask
            model.gating.heads[model.tasks.index("mask")].bias[0] += (logits[:, 1] - logits[:, 0]).median()
    checkpoint.save(path, model, {"preprocessing": PREPROCESSING._asdict()})
    return path


def run(model: Path, out: Path) -> None:
    export.main(["--checkpoint", str(model), "--out", str(out)])


def opened(file: Path) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function from images to outputs, from a file alone, as its users have it."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]

    def outputs_of(images: torch.Tensor) -> dict[str, torch.Tensor]:
        results = session.run(names, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, results), strict=True))

    return outputs_of


@torch.no_grad()
def expected_of(model: Path, images: torch.Tensor) -> Output:
    return checkpoint.load(model).model(normalize(images, PREPROCESSING.mean, PREPROCESSING.std))


def assert_same_mask(found: torch.Tensor, expected: torch.Tensor, threshold: float = 0.5) -> None:
    """The same mask, but where the expected probability is the threshold within the bound."""
    certain = (expected - threshold).abs() > ROUNDING
    assert certain.float().mean() > 0.99
    assert torch.equal((found > threshold)[certain], (expected > threshold)[certain])
    assert 0.1 < (expected > threshold).float().mean() < 0.9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "best.safetensors")


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Function that gives the exported file of a format, written once."""
    folder = tmp_path_factory.mktemp("exported")

    def file(form: str) -> Path:
        path = folder / f"model.{form}"
        if not path.is_file():
            run(model, path)
        return path

    return file


@pytest.mark.parametrize("form", FORMATS)
def test_outputs_are_those_of_the_checkpoint(files, model: Path, form: str) -> None:
    """For any batch and any size, one image included; the mask is the same."""
    outputs_of = opened(files(form))
    for images in (images_of(1, 32), images_of(3, 128)[..., :48, :], images_of(2, 256)):
        found, expected = outputs_of(images), expected_of(model, images)
        assert list(found) == ["probability", "sdf"]
        probability = predictor.gated_foreground(expected)
        torch.testing.assert_close(found["probability"], probability, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(found["sdf"], expected.sdf[:, 0].tanh(), rtol=0, atol=ROUNDING)
        if len(images) == 2:
            assert_same_mask(found["probability"], probability)


@pytest.mark.parametrize("form", FORMATS)
def test_other_inputs_are_refused(files, form: str) -> None:
    """Sizes that are no multiples of 16 and floating-point images, which might be in [0, 1]: errors, no wrong masks."""
    images, outputs_of = images_of(1, 64), opened(files(form))
    for wrong in (images[..., :40], images[:, :, :47], images.float()):
        with pytest.raises(Exception, match=r"Guard failed|mismatch|Unexpected input data type"):
            outputs_of(wrong)


@NEEDS_ONNX
def test_onnx_runtime_gives_the_masks_of_predict(files, model: Path, tmp_path: Path) -> None:
    images = images_of(2, 64, seed=5)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{number}.png")
    options = ["--input", str(tmp_path / "images"), "--out", str(tmp_path / "masks"), "--device", "cpu"]
    predict.main(["--checkpoint", str(model), *options])
    masks = np.stack([np.array(Image.open(tmp_path / "masks" / f"{number}.png")) for number in range(2)])
    probability = opened(files("onnx"))(images)["probability"]
    certain = (probability - 0.5).abs() > ROUNDING
    assert certain.float().mean() > 0.99
    assert ((masks > 0) == (probability > 0.5).numpy())[certain].all()


@NEEDS_ONNX
def test_onnx_runtime_gives_the_same_masks_on_glas(files, model: Path, glas_folder: Path) -> None:
    paths = list_images(glas_folder / "val" / "image")[:4]
    images = torch.stack([torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in paths]).contiguous()
    found, expected = opened(files("onnx"))(images), predictor.gated_foreground(expected_of(model, images))
    assert_same_mask(found["probability"], expected, expected.median().item())


def test_pt2_says_what_it_is(files) -> None:
    texts = dict.fromkeys(("semimoe_fast", "model", "preprocessing", "input", "outputs", "license"), "")
    program = torch.export.load(files("pt2"), extra_files=texts)
    assert_described(texts)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets
    assert not [target for target in targets if "semimoe" in target]  # PyTorch alone can load it
    with zipfile.ZipFile(files("pt2")) as archive:  # weights of BN are gone
        assert not [name for name in archive.namelist() if "running" in name]


@NEEDS_ONNX
def test_onnx_says_what_it_is(files) -> None:
    import onnx

    loaded = onnx.load(files("onnx"))
    onnx.checker.check_model(loaded)
    assert_described({entry.key: entry.value for entry in loaded.metadata_props})
    assert {node.domain for node in loaded.graph.node} == {""}  # standard operators alone
    assert "BatchNormalization" not in {node.op_type for node in loaded.graph.node}
    shape = [axis.dim_param or axis.dim_value for axis in loaded.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "16*rows", "16*columns"]


def assert_described(texts: dict[str, str]) -> None:
    stored = json.loads(texts["preprocessing"])
    assert stored == json.loads(json.dumps(PREPROCESSING._asdict()))
    assert json.loads(texts["model"]) == {"num_classes": 2, "width": 2, "expert_tasks": ["mask", "sdf", "boundary"]}
    assert "multiples of 16 from 32" in texts["input"]
    assert "sdf: float32 (B, H, W)" in texts["outputs"]
    assert "weights" in texts["license"]
    assert "Permission is hereby granted, free of charge" in texts["license"]


@pytest.mark.slow
def test_several_classes_and_no_sdf(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SemiMoE(width=2, num_classes=3, expert_tasks=("boundary", "mask", "mask")).eval()
    exporting.export(network, PREPROCESSING, tmp_path / "model.pt2")
    images = images_of(1, 64)
    found = opened(tmp_path / "model.pt2")(images)
    with torch.no_grad():
        logits = network(normalize(images, PREPROCESSING.mean, PREPROCESSING.std)).mask
    assert list(found) == ["probability"]
    torch.testing.assert_close(found["probability"], 1 - logits.softmax(1)[:, 0], rtol=0, atol=ROUNDING)


# refusals


def refused_export(model: Path, out: Path) -> str:
    before = {path: path.read_bytes() for path in out.parent.glob("*") if path.is_file()}
    line = refused(run, model, out)
    assert {path: path.read_bytes() for path in out.parent.glob("*") if path.is_file()} == before
    return line


@pytest.mark.parametrize("error", [2 * exporting.TOLERANCE, torch.nan])
def test_a_file_that_differs_is_not_written(model: Path, tmp_path: Path, monkeypatch, error: float) -> None:
    """The old file stays, and nothing is left beside it."""

    def wrong(part: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert part.read_text() == "new"
        expected = expected_of(model, images)
        return {"probability": predictor.gated_foreground(expected), "sdf": expected.sdf[:, 0].tanh() + error}

    monkeypatch.setattr(exporting, "_save_pt2", lambda predictor, part, *_: part.write_text("new"))
    monkeypatch.setattr(exporting, "_run_pt2", wrong)
    (tmp_path / "model.pt2").write_text("old")
    assert "model.pt2: not written, because its outputs differ" in refused_export(model, tmp_path / "model.pt2")


def test_models_without_mask_missing_checkpoints_and_bad_outputs(tmp_path: Path) -> None:
    model = save_model(tmp_path / "sdf", ("sdf",))
    assert "its experts learn sdf, no mask" in refused_export(model, tmp_path / "out.pt2")
    assert "does not exist" in refused_export(tmp_path / "none", tmp_path / "out.pt2")
    assert "out.pth: give a name that ends in .pt2, for PyTorch, or .onnx, for" in refused_export(
        model, tmp_path / "out.pth"
    )
    assert "the checkpoint itself: give another file" in refused_export(model, model)
    assert "there is no folder" in refused_export(model, tmp_path / "none" / "model.pt2")
    assert "which is a folder: give a file" in refused_export(model, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe: give a file" in refused_export(model, tmp_path / "pipe")


def test_missing_packages_and_too_large_models(model: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "MOST_ONNX_BYTES", 1000)
        patch.setattr(exporting, "require_onnx", lambda: None)
        patch.setattr(export, "require_onnx", lambda: None)
        assert "an ONNX file holds 2.1 GB: name it .pt2" in refused_export(model, tmp_path / "out.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = refused_export(model, tmp_path / "out.onnx")
    assert "onnxscript" in message.partition("an ONNX file needs")[2].partition(":")[0]
    assert "run `pip install 'semimoe_fast[export]'`" in message


def test_every_option_has_one_line_of_help(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        export.main(["--help"])
    lines = [line.strip(" │|") for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("--") and line.endswith("(required)") for line in lines) == 2
