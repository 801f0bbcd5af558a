"""benchmarks/measure.py: tables of what commands print and of pytest's benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semimoe_fast.errors import UserError

measure = pytest.importorskip("benchmarks.measure", reason="needs the source tree, and tests run from its root")

PRINTED = """some words
| step | ms | ratio |
| --- | --- | --- |
| width 16, cpu | 360.4 | 1.10 |

| habit | with / without |
| --- | --- |
| nchw | 1.183 |
| two |  |
"""


def test_printed_tables() -> None:
    tables = measure.printed(step={}, habits={"format": ".3f"})(measure.Output(PRINTED, []))
    assert tables["step"] == {"columns": ["step", "ms", "ratio"], "rows": [["width 16, cpu", 360.4, 1.1]]}
    assert tables["habits"]["rows"] == [["nchw", 1.183], ["two", None]]
    assert tables["habits"]["format"] == ".3f"
    with pytest.raises(ValueError, match="zip"):  # one table is missing
        measure.printed(step={}, habits={}, more={})(measure.Output(PRINTED, []))


def benchmark(name: str, seconds: float, **parameters: object) -> dict:
    return {"name": name, "params": parameters, "stats": {"median": seconds}}


def test_a_table_of_benchmarks() -> None:
    """Rows and columns keep their order, whatever is missing."""
    timed = [
        benchmark("test_multi_gate[...]", seconds, provider=provider, layout=layout)
        for provider, layout, seconds in (
            ("reference", "NCHW", 0.64721),
            ("reference", "channels-last", 0.75),
            ("portable", "NCHW", 0.0667),
        )
    ]
    timed.append(benchmark("test_objective_terms[...]", 1e-3, provider="fused", sets=2, batch=8))
    tables = measure.operations(measure.Output("", timed))
    assert tables["gating"] == {
        "columns": ["", "portable", "reference"],
        "rows": [["NCHW", 66.7, 647.0], ["channels-last", None, 750.0]],
        "ratios": {"reference / portable": ["reference", "portable"]},
    }
    assert tables["objective"]["rows"] == [["two sets of predictions, B = 8", 1.0]]


def test_a_page_is_measured_by_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = measure.Page("benchmarks.step_operators --width 4 --size 32 --fp32", 1, measure.printed(counted={}))
    monkeypatch.setattr(measure, "PAGES", {"count": page})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.main([])
    record = json.loads((tmp_path / "count.json").read_text())
    assert record["command"] == [f"OMP_NUM_THREADS=1 python -m {page.command}"]
    assert record["machine"].partition(",")[2].startswith(" 1 thread of ")
    (convolutions,) = (row for row in record["tables"]["counted"]["rows"] if row[0] == "convolution")
    assert convolutions[1] == 132

    with pytest.raises(UserError, match=r"^steps is no page: choose from count$"):
        measure.main(["steps"])
    monkeypatch.setitem(measure.PAGES, "count", page._replace(command="benchmarks.step_operators --size five"))
    with pytest.raises(UserError, match=r"step_operators --size five` ended with code 2: its output above says why$"):
        measure.main(["count"])
