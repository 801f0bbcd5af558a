"""Build the archives of the package, install its wheel, and use it inside and outside the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from patience import run_patiently

ROOT = Path(__file__).parents[2]
SOURCES = "csrc kernels semimoe_fast setup.py CMakeLists.txt pyproject.toml MANIFEST.in README.md LICENSE".split()
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree around the tests")

# Uses the compiled module, then prints the files that the package and its parts are loaded from.
REPORT = """
import json, sys
import semimoe_fast
assert "torch" not in sys.modules, "importing the package imports torch"
assert semimoe_fast.backend("reference") and "torch" in sys.modules
import importlib.metadata, importlib.util
import torch, _semimoe_fast, semimoe_fast.kernels, semimoe_fast.functional as F
assert semimoe_fast.__version__ == importlib.metadata.version("semimoe_fast")
assert F.squared_distance(torch.tensor([[1, 0, 0]])).tolist() == [[1, 1, 4]]
assert F.ops.choose("squared_distance", "cpu")[0] == "fused"
print(json.dumps({
    "package": semimoe_fast.__file__,
    "kernels": semimoe_fast.kernels.__file__,
    "native": _semimoe_fast.__file__,
    "built_with": _semimoe_fast.built_with,
}))
"""


# The variables of this process must not affect the environments under test.
VARIABLES = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
WHEN = {"SOURCE_DATE_EPOCH": "1700000000"}  # archives hold this time instead of that of the build


def copy_sources(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_that_is_left_out.py").touch()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds do not write into the real ones."""
    tree = tmp_path_factory.mktemp("tree")
    copy_sources(tree)
    return tree


@dataclass
class Environment:
    """An empty virtual environment that finds the dependencies installed in this one."""

    folder: Path

    def __post_init__(self) -> None:
        venv.create(self.folder, symlinks=True)
        self.python = self.folder / "bin" / "python"
        (self.site,) = self.folder.glob("lib/python*/site-packages")
        dependencies = [path for path in sys.path if path.endswith("-packages")]
        (self.site / "dependencies.pth").write_text("\n".join(dependencies))

    def pip(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja from pip
        return run_patiently(
            [sys.executable, "-m", "pip", "--python", self.python, *arguments, "--no-deps"],
            env={**VARIABLES, "PATH": path, **variables},
            capture_output=True,
            text=True,
        )

    def run(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Run Python in a folder, which `-c` and `-m` put first on its path; its standard output."""
        done = run_patiently(
            [self.python, *arguments], cwd=cwd, env={**VARIABLES, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def report(self, cwd: Path) -> dict:
        return json.loads(self.run("-c", REPORT, cwd=cwd))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("builder") / "venv")


def build_sdist(builder: Environment, tree: Path, out: Path) -> Path:
    """The source archive, built in `tree`."""
    build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(out)!r}))"
    return out / builder.run("-c", build, cwd=tree, **WHEN).splitlines()[-1]


def build_wheel(builder: Environment, source: Path, out: Path) -> Path:
    """The wheel of a folder or a source archive, whose build does not find nvcc."""
    without = {"SEMIMOE_CUDA": "AUTO", "CUDACXX": "/nowhere/nvcc"}
    built = builder.pip("wheel", "--no-build-isolation", "--wheel-dir", out, source, **without, **WHEN)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(builder: Environment, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(builder, tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(builder: Environment, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, which shows that both are complete."""
    return build_wheel(builder, sdist, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_installed_wheel(wheel: Path, tree: Path, environment: Environment, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", metadata)  # relative ones are dead on a package index
    assert len(links) > 20
    assert all("".join(link).startswith(("https://", "#")) for link in links)
    assert {"semimoe_fast/kernels/__init__.py", "semimoe_fast/py.typed"} <= set(names)
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert {name.split(".")[0] for name in top_level} == {"semimoe_fast", "_semimoe_fast"}  # nothing called kernels

    done = environment.pip("install", "--no-index", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    root, elsewhere = environment.report(cwd=tree), environment.report(cwd=tmp_path)
    assert Path(root["package"]).is_relative_to(tree)
    assert Path(elsewhere["package"]).is_relative_to(environment.site)
    for report in (root, elsewhere):
        assert Path(report["kernels"]).is_relative_to(environment.site)
        assert Path(report["native"]).is_relative_to(environment.site)
        assert report["built_with"]["cuda"] is None
    for folder in (tree, tmp_path):
        assert "usage" in environment.run("-m", "semimoe_fast.train", "--help", cwd=folder)
        assert "fused" in environment.run("-m", "semimoe_fast.info", cwd=folder)


@pytest.mark.slow
def test_archives_are_small(sdist: Path, wheel: Path) -> None:
    assert wheel.stat().st_size < 1_000_000, "the wheel without CUDA; release.yml and .ci/run check this too"
    assert sdist.stat().st_size < 1_000_000
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert names == {*SOURCES, "PKG-INFO", "setup.cfg", "semimoe_fast.egg-info"}


@pytest.mark.slow
def test_builds_are_reproducible(builder: Environment, sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """The same bytes at another time from another folder, without the source archive between."""
    tree = tmp_path / "another folder"
    copy_sources(tree)
    assert build_sdist(builder, tree, tmp_path).read_bytes() == sdist.read_bytes()
    assert differing(build_wheel(builder, tree, tmp_path), wheel) == []


def differing(one: Path, other: Path) -> list[str]:
    """The names of the files that two wheels do not share; the wheels themselves, if only their archives differ."""
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (first, second)]
    files = [name for name in contents[0] | contents[1] if contents[0].get(name) != contents[1].get(name)]
    return files or ([] if one.read_bytes() == other.read_bytes() else [one.name])


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"SEMIMOE_CUDA": "ON", "CUDACXX": "/nowhere/nvcc"},
            "SEMIMOE_CUDA=ON, but nvcc was not found: install the CUDA toolkit, "
            "or set CUDACXX to nvcc's path or SEMIMOE_CUDA=OFF.",
        ),
        (
            {"SEMIMOE_CUDA": "AUTO", "CUDACXX": shutil.which("false")},
            "see CMake's message above: correct the cause, or set SEMIMOE_CUDA=OFF to build without CUDA",
        ),
        ({"SEMIMOE_CUDA": "maybe"}, "SEMIMOE_CUDA=maybe is not known: set it to AUTO, ON or OFF."),
        pytest.param(
            {"SEMIMOE_CUDA_ARCHS": "80;1"},
            "SEMIMOE_CUDA_ARCHS=80;1: this nvcc does not know 1; it knows",
            marks=NEEDS_NVCC,
        ),
    ],
    ids=["CUDA without nvcc", "broken nvcc", "neither AUTO nor ON nor OFF", "unknown architecture"],
)
def test_impossible_builds_are_refused(
    tree: Path, environment: Environment, variables: dict[str, str], line: str
) -> None:
    done = environment.pip("install", "--no-build-isolation", tree, **variables)
    assert done.returncode != 0
    assert line in done.stdout + done.stderr
