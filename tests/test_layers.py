"""Modules import only from lower layers: commands, folders, model, operations, kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import semimoe_fast

# Every module imports only from the layers below it. Names on one line do not import each other.
LAYERS = [
    {"train", "evaluate", "predict", "export", "prepare", "synthetic", "info"},
    {"training"},
    {"evaluation"},
    {"inference"},
    {"data"},
    {"objective", "checkpoint", "options", "monai"},
    {"published", "validation"},
    {"model"},
    {"functional"},
    {"device", "files", "locks", "ops"},
    {"kernels", "errors"},
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
REFERENCE = "ops.reference"  # imports nothing of the package


def modules() -> dict[str, Path]:
    """The path of every module, by its name within the package."""
    names = {}
    for folder in map(Path, semimoe_fast.__path__):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            names[".".join(part for part in parts if part != "__init__")] = path
    del names[""]
    return names


def imports_of(name: str, path: Path) -> set[str]:
    """The modules and names of the package that a module imports, at the top or in functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(i.startswith("semimoe_fast") for i in imported), f"{path}: imports within are relative"
    return found - {"__version__"}


def test_no_module_imports_from_a_higher_layer() -> None:
    upwards = []
    for name, path in modules().items():
        folder = name.split(".")[0]
        for imported in imports_of(name, path):
            target = imported.split(".")[0]
            if target != folder and LAYER_OF[target] <= LAYER_OF[folder]:
                upwards.append(f"{name} imports {imported}")
    assert upwards == []


def test_reference_imports_nothing_of_the_package() -> None:
    assert imports_of(REFERENCE, modules()[REFERENCE]) == set()


def test_model_and_operations_import_no_posix_module() -> None:
    hide = "import sys; sys.modules |= dict.fromkeys(['fcntl', 'resource']); "
    names = ("functional", "model", "objective", "published", "checkpoint")
    imports = "import " + ", ".join(f"semimoe_fast.{name}" for name in names)
    done = subprocess.run([sys.executable, "-c", hide + imports], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_have_no_cycles() -> None:
    known = modules()
    edges = {}
    for name, path in known.items():
        nearest = {i if i in known else i.rpartition(".")[0] for i in imports_of(name, path)}
        edges[name] = {i for i in nearest if i in known and i != name}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    done: set[str] = set()
    for name in known:
        visit(name, ())
