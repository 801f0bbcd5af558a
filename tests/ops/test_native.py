"""The compiled module: the arguments it accepts, the message if it is missing, and its kernels under nvcc."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Ended, in_fork
from patience import run_patiently

from semimoe_fast.ops import _native, _triton

SOURCES = Path(__file__).parents[2] / "csrc"


def striped_masks(*shape: int) -> torch.Tensor:
    return (torch.arange(shape[-1]) // 7 % 2).to(torch.uint8).expand(shape).contiguous()


@pytest.mark.parametrize("shape", [(0, 1, 46_341), (0, 46_341, 1), (0, 40_000, 40_000)])
def test_too_large_masks_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]} pixels is too large"):
        _native.squared_distance(torch.empty(shape, dtype=torch.uint8), False, torch.empty(shape, dtype=torch.int32))


def test_native_calls_release_the_gil() -> None:
    """Python does not switch threads by itself here, so the main thread sees `inside` only if a call releases it.

    On a busy machine the main thread may wake after the call has ended, so the test makes several calls.
    """
    mask = striped_masks(1, 4096, 4096)
    out = torch.empty(mask.shape, dtype=torch.int32)
    _native.squared_distance(mask, False, out)  # loads the module, which may also release the GIL

    def seen_during_a_call() -> str:
        state = "before"
        entered = threading.Event()

        def work() -> None:
            nonlocal state
            state = "inside"
            entered.set()
            _native.squared_distance(mask, False, out)
            state = "after"

        worker = threading.Thread(target=work)
        worker.start()
        entered.wait()
        seen = state
        worker.join()
        return seen

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(seen_during_a_call() == "inside" for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def test_child_of_a_fork_does_not_wait_for_threads_that_it_lacks() -> None:
    """PyTorch's own loops would: the child makes no tensors."""
    torch.set_num_threads(2)
    mask = striped_masks(8, 256, 256)
    out, expected = (torch.empty(mask.shape, dtype=torch.int32) for _ in range(2))
    _native.squared_distance(mask, False, expected)

    def call() -> None:
        _native.squared_distance(mask, False, out)
        print((out.numpy() == expected.numpy()).all())

    assert in_fork(call, seconds=60) == Ended(0, "True\n")


def test_bool_and_uint8_masks_agree() -> None:
    mask = striped_masks(2, 33, 65)
    outs = torch.empty((2, *mask.shape), dtype=torch.int32)
    _native.squared_distance(mask * 255, False, outs[0])
    _native.squared_distance(mask.bool(), False, outs[1])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("mask", "out"),
    [
        (torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.int32)),
        (torch.zeros(1, 4, 5), torch.zeros(1, 4, 5, dtype=torch.int32)),
        (torch.zeros(1, 5, 4, dtype=torch.uint8).mT, torch.zeros(1, 4, 5, dtype=torch.int32)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 5, dtype=torch.int64)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.int32)),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 5, 4, dtype=torch.int32).mT),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.zeros(1, 4, 5, dtype=torch.int32, device="meta")),
    ],
    ids=["2-D mask", "float mask", "strided mask", "long out", "small out", "strided out", "out on another device"],
)
def test_unsupported_tensors_are_refused(mask: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"(labels are|out is) "):
        _native.squared_distance(mask, False, out)


FORK = """
import os, signal, torch
import semimoe_fast.functional as F
torch.set_num_threads(2)
masks = (torch.rand(2, 600, 600) > 0.5).byte()
torch.rand(1_000_000).exp()  # starts the threads of OpenMP
child = os.fork()
if child == 0:
    signal.alarm(60)
    F.squared_distance(masks)  # the first use of the compiled module
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    run_patiently([sys.executable, "-c", FORK], check=True)


@pytest.fixture
def reloaded() -> Iterator[None]:
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


@pytest.mark.usefixtures("reloaded")
def test_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_semimoe_fast", None)
    assert _native.module() is None
    assert "pip install ." in _native.why_missing()
    mask = torch.zeros(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="pip install"):
        _native.squared_distance(mask, False, mask.int())


@pytest.mark.usefixtures("reloaded")
def test_module_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "ABI", -1)
    assert _native.module() is None
    assert "ABI" in _native.why_missing()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("75 80", (8, 0), True),
        ("75 80", (8, 6), True),  # machine code for an older minor version runs
        ("86 90", (8, 0), False),  # for a newer one it does not
        ("80 90", (7, 0), False),
        ("80 90", (7, 5), False),
        ("80 90", (12, 0), True),  # PTX of the newest
        ("90 80", (9, 0), True),
        ("90 80", (10, 0), True),
        ("80 120", (10, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("100a", (10, 3), False),
    ],
)
def test_which_gpus_run_the_built_kernels(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(archs, capability) == runs


def test_unsupported_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 0)][index])
    reason = _native._why_no_gpu.__wrapped__("80 90")
    assert "built for sm 80 90, not 70" in reason
    assert "with 70 in SEMIMOE_CUDA_ARCHS" in reason


@pytest.mark.parametrize(("driver", "runs"), [(13000, True), (14010, True), (12080, False)])
def test_old_driver_is_explained(driver: int, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built_with = {"cuda": "13.0.88", "cuda_archs": "80 90"}
    module = types.SimpleNamespace(built_with=built_with, driver_version=lambda: driver)
    monkeypatch.setattr(_native, "module", lambda: module)
    monkeypatch.setattr(_native, "_why_no_gpu", lambda archs: None)
    reason = _native.why_unavailable("cuda")
    if runs:
        assert reason is None
    else:
        assert "built with CUDA 13.0.88, but the driver runs CUDA 12.8 at most: update" in reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_cuda_kernels_compile_without_warnings(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-cubin"]
    compiled = run_patiently(
        [*command, SOURCES / "distance.cu", "-o", tmp_path / "distance.cubin"], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    cubin = (tmp_path / "distance.cubin").read_bytes()
    assert b"distance_read_kernel" in cubin
    assert b"_GLOBAL__N_" not in cubin, "an anonymous namespace, named after the folder: not reproducible"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf was not found")
def test_the_module_links_system_libraries_alone() -> None:
    """Those that the manylinux policy allows: not torch, CUDA or OpenMP."""
    listed = subprocess.run(
        ["readelf", "--dynamic", _native.module().__file__], check=True, capture_output=True, text=True
    )
    linked = set(re.findall(r"\(NEEDED\).*\[(\S+?)\.so", listed.stdout))
    assert "libc" in linked
    assert linked <= set("libc libm libgcc_s libstdc++ libpthread libdl librt ld-linux-x86-64 ld-linux-aarch64".split())


def test_cuda_kernels_use_no_local_memory() -> None:
    """No stack and no spilled register, in the code of every GPU generation that the module was built for."""
    native = _native.module()
    if native.built_with["cuda"] is None:
        pytest.skip("the compiled module was built without CUDA")
    triton = pytest.importorskip("triton", reason="its package has cuobjdump")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [tool, "--dump-resource-usage", native.__file__], check=True, capture_output=True, text=True
    )
    assert set(re.findall(r"arch = sm_(\d+)", listed.stdout)) == set(native.built_with["cuda_archs"].split())
    kernels = len(re.findall("^__global__", (SOURCES / "distance.cu").read_text(), re.MULTILINE))
    used = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listed.stdout)
    assert used == [("0", "0")] * kernels * len(native.built_with["cuda_archs"].split())


def test_python_calls_the_cuda_function_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: an empty batch launches nothing."""
    native = _native.module()
    if native.built_with["cuda"] is None:
        pytest.skip("the compiled module was built without CUDA")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    assert native.driver_version() >= 0
    labels = torch.zeros(0, 4, 5, dtype=torch.int32)
    for targets in ({}, {"sdf": labels.float(), "boundary": labels.to(torch.uint8)}):
        _native._distance_cuda(native, labels, True, squared=labels, **targets)


def test_one_old_gpu_keeps_triton_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (6, 1)][index])
    assert _triton._why_no_gpu.__wrapped__().startswith(
        "GPU 1 is older than sm 80: leave it out of CUDA_VISIBLE_DEVICES"
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _triton._why_no_gpu.__wrapped__() == "the kernels are for NVIDIA GPUs"
