"""Print versions, how the compiled module was built, and the backends in use: `python -m semimoe_fast.info`."""

from __future__ import annotations

import argparse
import json
import platform

import numpy as np
import PIL
import torch

from . import __version__, ops
from .device import cuda_devices
from .errors import run_command
from .ops import _native


def versions() -> list[tuple[str, str]]:
    """Versions of the software and names of the devices, as (name, value)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(cuda_devices())]
    return [
        ("semimoe_fast", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("numpy", np.__version__),
        ("pillow", PIL.__version__),
        ("CUDA of torch", torch.version.cuda or "none, a CPU build"),
        ("GPU", ", ".join(gpus) or "none"),
        ("CPU threads", str(torch.get_num_threads())),
        ("predict on a CPU", "normalization folded into the convolutions, channels-last, eager"),
    ]


def triton_version() -> str:
    """Triton's version, read by importing it, because its package has different names."""
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def native_build() -> list[tuple[str, str]]:
    """File, compiler and CUDA version of the compiled module, as (name, value)."""
    native = _native.module()
    if native is None:
        return [("native module", _native.why_missing())]
    build = native.built_with
    cuda = f"{build['cuda']} for sm {build['cuda_archs']}" if build["cuda"] else "left out"
    return [
        ("native module", f"{native.__file__}, ABI {native.abi}"),
        ("  compiler", build["compiler"]),
        ("  pybind11", build["pybind11"]),
        ("  CPU kernels", f"{_native.instruction_set()} (here: {', '.join(native.instruction_sets)})"),
        ("  CUDA", cuda),
    ]


def backends() -> list[tuple[str, str, str, str]]:
    """The backend of each operation on this machine, as (operation, device, backend, reason)."""
    rows = []
    for operation in ops.OPERATIONS:
        for device_type in ("cpu", "cuda"):
            try:
                choice = ops.choose(operation, device_type, ops.forced_backend())
            except ops.BackendError as error:
                choice = ("none", str(error))
            if device_type == "cuda" and not torch.cuda.is_available():
                choice = ("none", "PyTorch finds no CUDA device")
            rows.append((operation, device_type, *choice))
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def as_json() -> str:
    """The same as one JSON object, for programs: the values by name, and the backends by operation and device."""
    values = {name.strip(): value for name, value in [*versions(), *native_build()]}
    choices = {f"{operation}, {device}": [backend, why] for operation, device, backend, why in backends()}
    return json.dumps({**values, "backends": choices}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m semimoe_fast.info", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if parser.parse_args().json:
        print(as_json())
        return
    print_table([*versions(), *native_build()])
    print()
    print_table([("operation", "tensors", "backend", "why"), *backends()])


if __name__ == "__main__":
    run_command(main)
