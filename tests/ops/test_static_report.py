"""The Triton kernels, compiled for every GPU generation without a GPU: spills, access width and memory traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree around the tests"),
]

# (operation, position of the launch): minimum number of a thread's 16-byte loads and stores for its pixels, over all
# experts. A tile of features takes four loads. Backward adds one load each for the gradients of the projections and of
# the own predictions.
WIDE = {
    ("multi-gate forward", 0): (3 * 4, 3 * 2),
    ("multi-gate forward", 1): (15, 5),
    ("multi-gate backward", 0): (20, 15),
    ("multi-gate backward", 1): (3 * (4 + 2), 3 * 4),
    ("pseudo-labels", 0): (15, 1),
    ("batch norm forward", 0): (4 + 4, 0),  # the first tile, and the loop over the others
    ("batch norm forward", 2): (4, 4),
    ("batch norm running statistics", 0): (0, 0),
    ("batch norm evaluation", 0): (4, 4),
    ("batch norm backward", 0): (8, 0),
    ("batch norm backward", 2): (8, 4),
    ("folding forward", 0): (2 * 9, 16),
    ("folding backward", 0): (16, 2 * 9),
    ("objective forward", 0): (10, 0),
    ("objective backward", 0): (10, 10),
    ("adaptive loss forward", 0): (0, 0),
    ("adaptive loss backward", 0): (0, 0),
}
# Most 16-byte loads of the parameters of a thread's channels: two for each parameter, if channels are last.
PARAMETERS = {
    ("batch norm forward", 2): 8,
    ("batch norm evaluation", 0): 8,
    ("batch norm backward", 0): 8,
    ("batch norm backward", 2): 12,
}
# The kernels of the upsampling convolutions have as many numbers in float32, but twice the bytes.
FLOAT32 = {("folding forward", 0): (2 * 9, 2 * 16), ("folding backward", 0): (2 * 16, 2 * 9)}
SPARE = 3  # with more loads or stores beyond the minimum, something is read or written twice


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The report, from a process of its own, because Triton chooses only once whether it interprets or compiles."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    run_without_interpreter("-m", "benchmarks.static_report", "--json", file)
    return json.loads(file.read_text())


def run_without_interpreter(*arguments: str | Path) -> str:
    """The output of Python with arguments, such that Triton compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launches(tables: dict[str, list[dict[str, Any]]]) -> dict[tuple, list[dict[str, Any]]]:
    """The kernels by operation, dtype, layout and GPU generation, in the order of their launches."""
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for row in tables["kernels"]:
        grouped.setdefault(tuple(row[key] for key in ("operation", "dtype", "layout", "sm")), []).append(row)
    return grouped


def failing(tables: dict[str, list[dict[str, Any]]], is_good: Callable[[int, dict[str, Any]], bool]) -> list[tuple]:
    return [
        (*case, position)
        for case, rows in launches(tables).items()
        for position, row in enumerate(rows)
        if not is_good(position, row)
    ]


def test_every_operation_is_compiled_for_every_generation(tables) -> None:
    cases = launches(tables)
    assert {(operation, sm) for operation, _, _, sm in cases} == {
        (operation, sm) for operation, _ in WIDE for sm in (80, 90, 100)
    }
    assert {(dtype, layout) for _, dtype, layout, _ in cases} == {
        (dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("NCHW", "channels-last")
    }


def test_no_kernel_spills(tables) -> None:
    assert failing(tables, lambda _, row: row["spills"] == row["stack"] == 0) == []


def test_pixels_move_16_bytes_at_a_time(tables) -> None:
    def is_wide(position: int, row: dict[str, Any]) -> bool:
        accesses = WIDE | FLOAT32 if row["dtype"] == "float32" else WIDE
        loads, stores = accesses.get((row["operation"], position), (0, 0))
        has_pixels = (row["operation"], position) in WIDE
        most_loads = loads + PARAMETERS.get((row["operation"], position), 0) + SPARE
        twice = row["128-bit loads"] > most_loads or row["128-bit stores"] > stores + SPARE
        return row["128-bit loads"] >= loads and row["128-bit stores"] >= stores and not (has_pixels and twice)

    assert failing(tables, is_wide) == []


def test_products_run_on_tensor_cores(tables) -> None:
    feature_passes = {("multi-gate forward", 0), ("multi-gate backward", 1)}

    def is_right(position: int, row: dict[str, Any]) -> bool:
        return (row["tensor-core instructions"] > 0) == ((row["operation"], position) in feature_passes)

    assert failing(tables, is_right) == []


def test_new_coefficients_of_the_adaptive_loss_need_no_new_kernel() -> None:
    program = """if True:
        import torch
        from benchmarks.launches import recorded
        from semimoe_fast.kernels import adaptive
        terms, log_vars = torch.empty(2, 3, device="meta")
        with recorded(90) as launches:
            for coefficients in ((1.0, 0.5, 1.0), (0.0, 0.25, 3.0)):
                adaptive.forward(terms, log_vars, coefficients, coefficients[1])
                adaptive.backward(terms[0], terms, log_vars, coefficients, coefficients[1])
        assert len(launches) == 4
        print(len({launch.binary for launch in launches}))
    """
    assert run_without_interpreter("-c", program) == "2\n"


def test_traffic_is_at_most_10_percent_above_the_floor(tables) -> None:
    above = [row for row in tables["traffic"] if not 1 <= row["ratio"] <= 1.1]
    assert above == []
    batch_norm = [row for row in tables["traffic"] if row["operation"].startswith("batch norm")]
    assert [row for row in batch_norm if row["ratio"] > 1.05] == []
    assert {row["operation"] for row in tables["traffic"]} == {operation for operation, _ in WIDE}
