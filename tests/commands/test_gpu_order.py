"""Which tests and benchmarks `make gpu-check` runs first."""

from __future__ import annotations

import re

import pytest

gpu_stages = pytest.importorskip("benchmarks.gpu_stages", reason="needs the source tree, and tests run from its root")


@pytest.mark.parametrize(
    ("test", "first"),
    [
        ("tests/ops/test_distance.py::test_random_masks[cuda]", True),
        ("tests/ops/test_instances.py::test_touching_instances[cuda-1-40-5]", True),
        ("tests/ops/test_targets.py::test_device_arrays_of_other_libraries[numba.cuda]", True),
        ("tests/training/test_graphs.py::test_cuda_graph_equals_the_eager_step[{}]", True),
        ("tests/training/test_graphs.py::test_step_does_not_synchronize_the_device[published]", True),
        ("tests/training/test_speed.py::test_peak_memory_of_a_gpu_counts_tensors", True),
        ("tests/ops/test_native.py::test_python_calls_the_cuda_function_with_its_arguments", False),
        ("tests/ops/test_distance_cuda.py::test_random_instances[cuda on the cpu]", False),
        ("tests/ops/test_distance_cuda.py::test_far_instances_without_background[1-1-40-5]", False),
        ("tests/ops/test_native.py::test_cuda_kernels_compile_without_warnings", False),
        ("tests/commands/test_gpu_check.py::test_machine_without_a_gpu_is_refused", False),
    ],
)
def test_tests_that_need_the_gpu_run_first(test: str, first: bool) -> None:
    assert any(re.search(pattern, test) for pattern in gpu_stages.OF_THE_GPU) == first
    path, name = test.split("[")[0].split("::")
    assert f"def {name}(" in (gpu_stages.ROOT / path).read_text()


@pytest.mark.parametrize(
    ("patterns", "folder"), [(gpu_stages.TESTS_FIRST, "tests"), (gpu_stages.OPERATIONS_FIRST, "benchmarks")]
)
def test_patterns_of_what_runs_first_name_tests_that_exist(patterns: tuple[str, ...], folder: str) -> None:
    """A renamed test must not lose its place. The parameters of a test on CUDA cannot be collected here."""
    files = (path for path in (gpu_stages.ROOT / folder).rglob("test_*.py") if not path.name.startswith("test_gpu_"))
    sources = "\n".join(f"{path.as_posix()}\n{path.read_text()}" for path in files)
    for pattern in patterns:
        name, *parameters = pattern.split(r"\[")
        name = rf"def test_\w*{name}\(" if parameters else name.removesuffix("-8-both").removeprefix("-")
        assert re.search(name, sources), pattern
