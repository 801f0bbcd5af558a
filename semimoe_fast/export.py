"""Write a checkpoint's predictor for other programs: `python -m semimoe_fast.export --checkpoint C --out FILE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from . import checkpoint
from .checkpoint import Preprocessing
from .errors import UserError, one_line, run_command
from .inference.exporting import export, format_of, require_onnx
from .inference.predictor import require_mask
from .options import read_options, require_writable


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write the predictor with its normalization as one file that needs none of this package.

    The input is uint8 RGB (B, 3, H, W), H and W multiples of 16 from 32; the outputs are the foreground probability
    and the signed distance field. The file is loaded again and compared with the checkpoint before it gets its name.
    """

    checkpoint: Path
    """best.safetensors or last.safetensors of a run folder."""
    out: Path
    """File to write or replace: NAME.pt2 for PyTorch, NAME.onnx for ONNX Runtime and others."""


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_options(ExportConfig, "semimoe_fast.export", arguments)
    if config.out.resolve() == config.checkpoint.resolve():
        raise UserError(f"--out is {config.out}, the checkpoint itself: give another file")
    require_writable("--out", config.out)
    if format_of(config.out) == ".onnx":
        require_onnx()
    model, metadata, _ = checkpoint.load(config.checkpoint)
    require_mask(config.checkpoint, model)
    preprocessing = Preprocessing.of(config.checkpoint, metadata)
    difference = export(model, preprocessing, config.out)
    size = config.out.stat().st_size / 1e6
    path = one_line(str(config.out))
    print(f"{path}: {size:.1f} MB, outputs within {difference:.1g} of the checkpoint's on random images")


if __name__ == "__main__":
    run_command(main)
