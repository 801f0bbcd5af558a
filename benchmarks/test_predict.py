"""Prediction of one tile of 512 x 512 pixels on one CPU thread, beside what PyTorch and ONNX Runtime do with the model.

    make bench ARGS="-k test_predict"

"eager" is the model with nn.BatchNorm2d and nn.ReLU in eval mode, all heads, as anyone would write it; "as trained" is
the model with the fused normalization of training. "predict" is what the command does: normalization in the
convolutions, the mask's head alone, and freed memory that stays with the process. "predict compiled" and ONNX Runtime,
which is skipped if it is not installed, get that same network. Times are those of the processor, so other programs on
the machine matter less.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semimoe_fast import backend
from semimoe_fast.checkpoint import Preprocessing
from semimoe_fast.data.augment import normalize
from semimoe_fast.data.glands import glands
from semimoe_fast.device import keep_freed_memory
from semimoe_fast.inference import folded, predict_image
from semimoe_fast.model import BatchNormReLU, SemiMoE

SIDE = 512
PREPROCESSING = Preprocessing(SIDE, (0.8, 0.5, 0.8), (0.2, 0.2, 0.2), sampling="crops")

Predict = Callable[[np.ndarray], Tensor]  # uint8 (SIDE, SIDE, 3) -> probability (SIDE, SIDE)


class Plain(nn.Module):
    """Batch normalization and ReLU by torch's own modules."""

    def __init__(self, norm: BatchNormReLU) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, norm.eps)
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor, groups: int = 1, skip: Tensor | None = None) -> Tensor:
        y = torch.relu_(self.norm(x))
        return y if skip is None else torch.cat([skip, y], 1)


class MaskOnly(nn.Module):
    """The mask logits of a folded model: images (B, 3, H, W) -> (B, 2, H, W)."""

    def __init__(self, model: SemiMoE) -> None:
        super().__init__()
        self.model = folded(model, ["mask"])

    def forward(self, images: Tensor) -> Tensor:
        return self.model.gating([expert.features(images) for expert in self.model.experts])[0]


def images_of(pixels: np.ndarray) -> Tensor:
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return normalize(images, PREPROCESSING.mean, PREPROCESSING.std)


def by(network: Callable[[Tensor], Tensor]) -> Predict:
    """Predict with a function that gives mask logits."""
    return lambda pixels: network(images_of(pixels)).softmax(1)[0, 1]


def as_trained(model: SemiMoE) -> Predict:
    return by(lambda images: model(images).mask)


def eager(model: SemiMoE) -> Predict:
    model = copy.deepcopy(model)
    for block in list(model.modules()):
        for name, layer in block.named_children():
            if isinstance(layer, BatchNormReLU):
                setattr(block, name, Plain(layer).eval())
    return as_trained(model)


def compiled(model: SemiMoE) -> Predict:
    network = torch.compile(MaskOnly(model), dynamic=False)
    return by(network)


def onnx_runtime(model: SemiMoE) -> Predict:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    example = torch.zeros(1, 3, SIDE, SIDE)
    with backend("reference"):  # operations of torch alone
        torch.onnx.export(MaskOnly(model).eval(), (example,), dynamo=True).save(file)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return by(lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]))


def predict(model: SemiMoE) -> Predict:
    keep_freed_memory()  # stays on, so this provider comes last
    model = folded(model, ["mask"])
    return lambda pixels: torch.cat([piece.probability for _, piece in predict_image(model, pixels, PREPROCESSING)])


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("provider", [eager, as_trained, compiled, onnx_runtime, predict])
@torch.no_grad()
def test_predict(benchmark, one_thread: None, provider: Callable[[SemiMoE], Predict], width: int) -> None:
    benchmark.group = f"predict {SIDE} x {SIDE} pixels, width {width}"
    torch.manual_seed(0)
    model = SemiMoE(width=width).to(memory_format=torch.channels_last)
    pixels = glands(1, SIDE, seed=0)[0][0].permute(1, 2, 0).contiguous().numpy()
    model(images_of(pixels)[..., :128, :128])  # statistics of batch normalization
    model.eval()
    call = provider(model)
    assert (call(pixels) - as_trained(model)(pixels)).abs().max() < 1e-4  # float32 sums in another order, 23 layers
    benchmark.pedantic(call, (pixels,), rounds=3)
    benchmark.extra_info["megapixels_per_second"] = SIDE**2 / 1e6 / benchmark.stats["min"] if benchmark.enabled else 0
