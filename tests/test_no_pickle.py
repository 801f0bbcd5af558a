"""No code runs from a file: no pickle, no eval, in the package, the kernels, the benchmarks and the examples."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next((folder for folder in Path(__file__).parents if (folder / "setup.py").is_file()), Path())
SOURCES = sorted(
    path for name in ("semimoe_fast", "kernels", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")
)
MODULES = "pickle _pickle cPickle dill cloudpickle joblib shelve marshal yaml".split()
BUILTINS = "eval exec compile __import__".split()
FUNCTIONS = [  # the end of a dotted name; each reads or writes pickles
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package", "broadcast_object_list",
    "all_gather_object", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list",
    "read_pickle", "to_pickle", "torch.export.save", "torch.export.load",
]  # fmt: skip
ALLOWED = {
    ("semimoe_fast/published.py", "torch.load"): "weights_only: the files of the published code are torch files",
    ("semimoe_fast/inference/exporting.py", "torch.export.save"): "pt2 is the format that was asked for",
    (
        "semimoe_fast/inference/exporting.py",
        "torch.export.load",
    ): "of the file that export has just written, to check it",
}

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree around the tests")


def executing(source: str) -> Iterator[tuple[str, ast.AST]]:
    """What can run code from a file, or read a pickle: names of modules and functions, with their nodes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((name, node) for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BUILTINS or any(f".{name}".endswith(f".{function}") for function in FUNCTIONS):
                yield name, node
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield f"{name} with allow_pickle", node


def test_nothing_executes_what_a_file_holds() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name): node
        for path in SOURCES
        for name, node in executing(path.read_text())
    }
    assert found.keys() == ALLOWED.keys(), sorted(found.keys() ^ ALLOWED.keys())
    (safe,) = [ast.unparse(node) for (_, name), node in found.items() if name == "torch.load"]
    assert "weights_only=True" in safe


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "import yaml as y", "torch.load(path)", "exec(text)",
        "np.load(path, allow_pickle=True)", "dist.broadcast_object_list(values)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert list(executing(line))


@pytest.mark.parametrize(
    "line", ["np.load(path)", "torch.compile(f)", "re.compile(p)", "model.eval()", "json.load(file)"]
)
def test_the_search_passes(line: str) -> None:
    assert not list(executing(line))
