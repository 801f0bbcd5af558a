"""The predictor as one file that needs none of this package: a program of torch.export (pt2) or an ONNX model.

Input `images`: uint8 RGB (B, 3, H, W), values 0 to 255; H and W are multiples of 16, >= 32; normalized inside.
Outputs `probability`, of the foreground, and, if the model has an sdf expert, `sdf` in [-1, 1]: float32 (B, H, W).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__, ops
from ..checkpoint import Preprocessing
from ..data import augment
from ..errors import UserError
from ..files import write_atomically
from ..model import STRIDE, SemiMoE
from .folding import folded
from .predictor import gated_foreground

FORMATS = ".pt2", ".onnx"  # the endings of files

# A file's outputs differ from the model's by float32 rounding: BN is folded, and sums have another order. Models of
# width 2 to 64 differ by less than 1e-5; a wrong weight or normalization makes a difference far above 1e-3.
TOLERANCE = 1e-3

LEAST_SIDE = 2 * STRIDE  # torch.export takes a size of one pixel, here at the deepest level, for a constant
MOST_ONNX_BYTES = 2**31 - 1  # of a protobuf message, which an ONNX file is
DYNAMIC = {  # axes of the images
    0: torch.export.Dim("batch"),
    2: STRIDE * torch.export.Dim("rows"),
    3: STRIDE * torch.export.Dim("columns"),
}


class Predictor(nn.Module):
    """Normalization, model and output functions: images as the module's docstring says -> outputs by name."""

    def __init__(self, model: SemiMoE, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = augment.normalize(images, self.mean, self.std)
        output = self.model(images.contiguous(memory_format=torch.channels_last))  # convolutions are faster so
        fields = {"probability": gated_foreground(output)}
        if output.sdf is not None:
            fields["sdf"] = output.sdf[:, 0].tanh()
        return fields


def format_of(path: Path) -> str:
    """The ending of a file's name, one of FORMATS. Raises UserError for any other."""
    if (ending := path.suffix.lower()) not in FORMATS:
        raise UserError(f"{path}: give a name that ends in .pt2, for PyTorch, or .onnx, for ONNX Runtime and others")
    return ending


def export(model: SemiMoE, preprocessing: Preprocessing, path: Path) -> float:
    """Write the predictor of a model to a file .pt2 or .onnx, load the file and compare its outputs with the model's.

    model: on the CPU and in eval mode, with a mask expert.
    Returns the largest difference on random images; the file appears under its name only if that is at most TOLERANCE.
    Raises UserError if it is more, for other names, if the model is too large for ONNX or if packages are missing.
    """
    ending = format_of(path)
    kept = [task for task in ("mask", "sdf") if task in model.tasks]
    written = Predictor(folded(model, kept), preprocessing).eval().to(memory_format=torch.contiguous_format)
    size = sum(weight.numel() * weight.element_size() for weight in written.parameters())
    if ending == ".onnx":
        require_onnx()
        if size > MOST_ONNX_BYTES:
            raise UserError(f"{path}: the weights are {size / 1e9:.1f} GB, but an ONNX file holds 2.1 GB: name it .pt2")
    save, run = (_save_pt2, _run_pt2) if ending == ".pt2" else (_save_onnx, _run_onnx)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 3 * STRIDE, 5 * STRIDE), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = Predictor(model, preprocessing)(images)
    difference = torch.inf

    def write(part: Path) -> None:
        nonlocal difference
        save(written, part, description(model, preprocessing), list(expected))
        found = run(part, images)
        difference = torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max().item()
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: not written, because its outputs differ from the checkpoint's by {difference:.2g}, more than "
                f"{TOLERANCE:g}; give a checkpoint that has not diverged, or write the other format"
            )

    write_atomically(path, write)
    return difference


def require_onnx() -> None:
    """Raise UserError unless the packages that write and check ONNX files are installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f"an ONNX file needs {', '.join(missing)}: run `pip install 'semimoe_fast[export]'`")


def description(model: SemiMoE, preprocessing: Preprocessing) -> dict[str, str]:
    """What a file says about itself, by key: metadata of ONNX, extra files of pt2. Two values are JSON."""
    arguments = {"num_classes": model.num_classes, "width": model.width, "expert_tasks": model.expert_tasks}
    outputs = "probability: float32 (B, H, W), of the foreground"
    if "sdf" in model.tasks:
        outputs += "; sdf: float32 (B, H, W), signed distance field in [-1, 1], positive in the foreground"
    return {
        "semimoe_fast": __version__,
        "model": json.dumps(arguments),
        "preprocessing": json.dumps(preprocessing._asdict()),
        "input": f"images: uint8 RGB (B, 3, H, W), 0 to 255, normalized inside; "
        f"H and W are multiples of {STRIDE} from {LEAST_SIDE}",
        "outputs": outputs,
        "license": "This license is that of the network's code. The license of the weights is the choice of whoever "
        f"trained them, within the terms of the training images.\n\n{_license_of_code()}",
    }


def _license_of_code() -> str:
    try:
        text = importlib.metadata.distribution("semimoe_fast").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    return text or (Path(__file__).parents[2] / "LICENSE").read_text()  # of a checkout


def _traced(predictor: Predictor) -> torch.export.ExportedProgram:
    """The predictor as operations of PyTorch alone, for any batch and size."""
    images = torch.zeros(2, 3, 2 * STRIDE, 3 * STRIDE, dtype=torch.uint8)
    with torch.no_grad(), ops.backend("reference"):  # it has no custom ops
        return torch.export.export(predictor, (images,), dynamic_shapes=(DYNAMIC,))


def _save_pt2(predictor: Predictor, path: Path, texts: Mapping[str, str], outputs: Sequence[str]) -> None:
    archive = io.BytesIO()  # PyTorch's writer aborts the process if the disk is full
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)  # `export` compares outputs
        torch.export.save(_traced(predictor), archive, extra_files=dict(texts))
    path.write_bytes(archive.getbuffer())


def _run_pt2(path: Path, images: Tensor) -> dict[str, Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()(images)


def _save_onnx(predictor: Predictor, path: Path, texts: Mapping[str, str], outputs: Sequence[str]) -> None:
    with _quiet():
        onnx = torch.onnx.export(
            _traced(predictor),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=(DYNAMIC,),
        )
    onnx.model.metadata_props.update(texts)
    onnx.save(path, external_data=False)


def _run_onnx(path: Path, images: Tensor) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.onnx says about itself: torchvision is not installed, and one of its classes is deprecated."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
