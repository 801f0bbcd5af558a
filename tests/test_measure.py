"""benchmarks/measure.py: tables of what commands print and of pytest's benchmarks."""

from __future__ import annotations

import json
import re
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


def benchmark(name: str, seconds: float, extra: dict | None = None, **parameters: object) -> dict:
    return {"name": name, "params": parameters, "stats": {"median": seconds}, "extra_info": extra or {}}


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
    timed.append(benchmark("test_objective_terms[...]", 1e-3, provider="fused", sets=2, batch=2))
    tables = measure.operations(measure.Output("", timed))
    assert tables["gating"] == {
        "columns": ["", "portable", "reference"],
        "rows": [["NCHW", 66.7, 647.0], ["channels-last", None, 750.0]],
        "ratios": {"reference / portable": ["reference", "portable"]},
    }
    assert tables["objective"]["rows"] == [["two sets of predictions, B = 2", 1.0]]


def test_pages_of_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The names that tables.py and the pages read."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    timing = {"device": "cpu", "share_of_floor": 0.5}
    sized = {"batch": 8, "side": 256}
    targets = measure.targets(
        measure.Output(
            "",
            [
                benchmark("test_glands[a]", 1, timing | {"ns_per_pixel": 2.0}, provider="ours, avx2", **sized),
                benchmark("test_glands[b]", 1, timing | {"ns_per_pixel": 9.0}, provider="edt", **sized),
                benchmark("test_worst_masks[a]", 1, timing | {"ns_per_pixel": 3.0}, provider="ours, avx2", mask="disc"),
                benchmark("test_threads[a]", 1, timing | {"ns_per_pixel": 3.0}, threads=1, **sized),
                benchmark("test_threads[b]", 1, timing | {"ns_per_pixel": 2.0}, threads=2, **sized),
            ],
        )
    )
    assert targets["glands"]["columns"][1:] == ["8 x 256 x 256"]
    assert targets["glands"]["rows"] == [["ours, avx2", 2.0], ["edt", 9.0], ["copy of 6 bytes, cpu", 4.5]]
    assert targets["glands"]["relative_to"] == "ours, avx2"
    assert targets["worst"]["columns"][1:] == ["disc"]
    assert targets["threads"]["rows"][2] == ["two threads, times as fast", "1.50"]
    assert (tmp_path / "targets.png").exists()

    timed = [benchmark("test_instances[a]", 1e-3, {"instances": 14, "pixels": 10**6}, side=1024, provider="ours, avx2")]
    instances = measure.instances(measure.Output("", timed))["maps"]
    assert instances["columns"][1:] == ["1024 x 1024, 14"]
    assert instances["rows"] == [["ours, avx2", 1.0]]

    timed = [
        benchmark("test_batch_norm_relu[a]", seconds, peer=["cpu", name], shape=[4, 16, 128, 128], threads=2)
        for name, seconds in (("torch", 4e-3), ("ours, avx2", 1e-3), ("ours, plain", 2e-3))
    ]
    batch_norm = measure.batch_norm(measure.Output("", timed))["batch_norm"]
    assert batch_norm["columns"] == ["shape", "AVX2", "plain", "torch"]
    assert batch_norm["rows"] == [["(4, 16, 128, 128), 2 threads", 1.0, 2.0, 4.0]]
    assert batch_norm["ratios"] == {"torch / AVX2": ["torch", "AVX2"]}

    timed = [
        benchmark(f"test_predict[{name}-16]", 1, {"megapixels_per_second": 0.5})
        for name in ("eager", "as_trained", "compiled", "onnx_runtime", "predict")
    ]
    predict = measure.predict(measure.Output("", timed))["predict"]
    assert predict["columns"][1:] == ["width 16"]
    assert len(predict["rows"]) == 5


def test_the_table_of_a_profile() -> None:
    lines = [f"{'':<22}{'ms a step':>10}{'share':>9}", f"{'batch normalization':<22}{53.714:10.2f}{0.1228:9.1%}"]
    (rows,) = (table["rows"] for table in measure.profile(measure.Output("\n".join(lines), [])).values())
    assert rows == [["batch normalization", 53.71, "12.3%"]]
    with pytest.raises(UserError, match=r"^the profile has no table"):
        measure.profile(measure.Output("--profile: no result", []))


def test_a_page_is_measured_by_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = measure.Page("benchmarks.step_operators --width 4 --size 32 --fp32", 1, measure.printed(counted={}))
    monkeypatch.setattr(measure, "PAGES", {"count": page})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.main([])
    record = json.loads((tmp_path / "count.json").read_text())
    assert record["command"] == [
        f"CUDA_VISIBLE_DEVICES= GOMP_SPINCOUNT=10000 OMP_NUM_THREADS=1 python -m {page.command}"
    ]
    assert re.search(
        r", 1 thread unless the table says otherwise, \w+, \d+% taken by other programs$", record["machine"]
    )
    assert any(row[0] == "convolution" for row in record["tables"]["counted"]["rows"])

    with pytest.raises(UserError, match=r"^steps is no page: choose from count$"):
        measure.main(["steps"])
    monkeypatch.setitem(measure.PAGES, "count", page._replace(command="benchmarks.step_operators --size five"))
    with pytest.raises(UserError, match=r"step_operators --size five` ended with code 2: its output above says why$"):
        measure.main(["count"])
