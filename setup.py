"""Builds the native module with CMake. The package's metadata is in pyproject.toml."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
CUDA = os.environ.get("SEMIMOE_CUDA", "AUTO")
REPOSITORY = "https://github.com/semimoe-fast/semimoe_fast"


def find_tool(name: str) -> str:
    """The path of a tool that is on the path or in Python's scripts folder."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"error: {name} was not found: run `pip install cmake ninja`, or build with isolation")
    return found


class CMakeBuild(build_ext):
    """Configures and builds in a temporary folder, because CMake's cache of an earlier build may not fit."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SEMIMOE_CUDA": CUDA,
            "SEMIMOE_CUDA_ARCHS": os.environ.get("SEMIMOE_CUDA_ARCHS", ""),
        }
        with tempfile.TemporaryDirectory(prefix="semimoe_fast-") as build:
            definitions = [f"-D{name}={value}" for name, value in settings.items()]
            self._run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions)
            self._run(cmake, "--build", build)

    @staticmethod
    def _run(*command: str | Path) -> None:
        if subprocess.run(command, check=False).returncode != 0:
            remedy = "" if CUDA == "OFF" else ": correct the cause, or set SEMIMOE_CUDA=OFF to build without CUDA"
            raise SystemExit(f"error: the native module could not be built, see CMake's message above{remedy}")


class ReproducibleSdist(sdist):
    """The bytes of the archive depend on its files and SOURCE_DATE_EPOCH alone, not on their times and owners."""

    def make_archive(
        self, base_name: str, format: str, root_dir: str | None = None, base_dir: str | None = None, **owner: str | None
    ) -> str:
        moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            mode = 0o755 if member.mode & 0o100 else 0o644
            return member.replace(mtime=moment, mode=mode, uid=0, gid=0, uname="", gname="", deep=False)

        path = f"{base_name}.tar.gz"
        with gzip.GzipFile(path, "wb", mtime=moment) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(base_dir, filter=plain)
        return path


def readme() -> str:
    """README.md with absolute links, because package indexes do not resolve relative ones."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<=\]\()(?!https?:|#)", f"{REPOSITORY}/blob/main/", text)
    return re.sub(r'(?<=src=")(?!https?:)', f"{REPOSITORY}/raw/main/", text)


sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir())
setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("_semimoe_fast", sources=[], depends=["CMakeLists.txt", *sources])],
    cmdclass={"build_ext": CMakeBuild, "sdist": ReproducibleSdist},
)
