"""The documentation is correct: snippets run, links lead somewhere, tables hold the measured numbers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import in_fork, run_module
from PIL import Image

ROOT = next((folder for folder in Path(__file__).parents if (folder / "README.md").is_file()), Path())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [*(ROOT / "benchmarks" / "results").glob("*.md"), ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
NEEDED = {"semimoe_fast.monai": ["monai"], "import onnxruntime": ["onnx", "onnxscript", "onnxruntime"]}  # by snippets
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree around the tests")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of the line before it."""
    text = page.read_text()
    found = FENCED.finditer(text)
    return [(text[: match.start(2)].count("\n"), match[2]) for match in found if match[1] == language]


def with_blocks(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them, in a new folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippets"}
    for line, block in blocks(page, "python"):
        for sign, packages in NEEDED.items():
            for package in packages if sign in block else ():
                pytest.importorskip(package)
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


# What a line of shell becomes before it runs: the first pattern that it contains decides. Of an option given twice, the
# last counts.
SMALL_RUN = (
    "--image-size 32 --width 2 --epochs 1 --warmup-epochs 0 --steps-per-epoch 1 --lr 0.1 "
    "--labeled-batch 2 --unlabeled-batch 2 --device cpu --threads 1"
)
SUBSTITUTIONS = [
    (r"^make train", "make --dry-run train"),  # the recipe is python -m semimoe_fast.train, which other lines run
    (r"^make (\w+)", r"make --dry-run \1"),  # .ci/run executes test and lint
    (r"^git (stash|stash pop)$", "true"),  # changes the working tree
    (r"^\. \.venv/bin/activate$", "true"),  # these tests run in the environment that it makes the current one
    (r"(semimoe_fast\.synthetic .*--sizes .*)", r"\1 --size 32 --sizes 24 60 --labeled 2 --unlabeled 4 --val 2"),
    (r"(semimoe_fast\.synthetic .*)", r"\1 --size 32 --labeled 2 --unlabeled 4 --val 2"),
    (r"^torchrun --nproc-per-node 4 (.*)", rf"torchrun --nproc-per-node 2 \1 {SMALL_RUN}"),
    (r"(semimoe_fast\.train --resume .*)", r"\1"),  # as it is: a resumed run brings its own options
    (r"(semimoe_fast\.train .*)", rf"\1 {SMALL_RUN}"),
    (r"(semimoe_fast\.(evaluate --checkpoint|predict) .*)", r"\1 --device cpu"),  # a fork cannot use a GPU
    (r"(semimoe_fast\.(evaluate|prepare|export) .*)", r"\1"),  # as they are
]


def substituted(line: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        if re.search(pattern, line):
            return re.sub(pattern, replacement, line)
    raise AssertionError(f"no substitution says how to run {line!r}")


def as_distributed(folder: Path) -> None:
    """GlaS and CRAG with images of 32 x 32, as many of them as the page splits."""
    names = [
        f"{part}_{number}" for part, count in (("train", 85), ("testA", 2), ("testB", 1)) for number in range(count)
    ]
    glas = folder / "Warwick QU Dataset (Released 2016_07_08)"
    pairs = [(glas / f"{name}.bmp", glas / f"{name}_anno.bmp") for name in names]
    for part, count in (("train", 36), ("valid", 1)):
        crag = folder / "CRAG_v2" / "CRAG" / part
        pairs += [(crag / "Images" / f"{n}.png", crag / "Annotation" / f"{n}.png") for n in range(count)]
    rng = np.random.default_rng(0)
    for image, mask in pairs:
        for path, shape in ((image, (32, 32, 3)), (mask, (32, 32))):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 2 if path == mask else 256, shape, np.uint8)).save(path)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """Every line of the page's shell blocks, in order, in one folder with the data sets that it names."""
    pytest.importorskip("tyro")
    as_distributed(tmp_path)
    for _, block in blocks(page, "sh"):
        for line in block.splitlines():
            ended = in_fork(functools.partial(execute, shlex.split(substituted(line)), tmp_path))
            assert ended.status == 0, f"{page.name}: {line}\n{ended.output}"


def execute(command: list[str], folder: Path) -> None:
    """Run the command in this process: a module by runpy, another program by exec."""
    os.chdir(ROOT if command[0] == "make" else folder)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if command[:2] == ["python", "-m"]:
        run_module(*command[2:])
    else:
        os.execvp(command[0], command)


@pytest.mark.slow
def test_benchmarks_have_the_options_that_the_pages_give_them() -> None:
    """Their commands take too long to run."""
    given: dict[str, set[str]] = {}
    for page in [*PAGES, *OTHER_PAGES]:
        for module, rest in re.findall(r"python -m (benchmarks[\w.]*)((?:\\\n|[^`\n])*)", page.read_text()):
            given.setdefault(module, set()).update(re.findall(r"(?<!\S)--[a-z-]+", rest))
    assert sum(map(len, given.values())) > 20
    for module, options in given.items():
        assert importlib.util.find_spec(module), module
        if options:
            ended = in_fork(functools.partial(run_module, module, "--help"))
            assert ended.status == 0, f"{module}: {ended.output}"
            assert options <= set(re.findall(r"--[a-z-]+", ended.output)), f"{module} lacks some of {options}"


def test_make_has_the_targets_that_the_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    for page in PAGES:
        named = set(re.findall(r"`make ([\w-]+)", page.read_text()))
        assert named <= targets, f"{page.name} names {sorted(named - targets)}"


def test_links_and_paths_lead_to_files() -> None:
    for page in [*PAGES, *OTHER_PAGES]:
        text = page.read_text()
        for target in re.findall(r"""(?:\]\(|src=")([^)"#\s]+)""", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
        for path in re.findall(r"`((?:benchmarks|csrc|docs|kernels|semimoe_fast|tests)/[\w/.]*)`", text):
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}"


def test_tables_hold_the_measured_numbers() -> None:
    from benchmarks import tables

    pages = tables.pages()
    assert sum(page.read_text().count("<!-- table ") for page in pages) > 10
    assert tables.stale() == [], "run make tables"


def test_a_changed_number_makes_a_page_stale() -> None:
    from benchmarks import tables

    page = (ROOT / "README.md").read_text()
    table = tables.table("accuracy")
    assert table in page
    assert tables.render(page.replace(table, table.replace("0.9", "0.8"))) == page


def test_the_table_of_environment_variables_is_complete() -> None:
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    sources = [ROOT / "setup.py", *(ROOT / "semimoe_fast").rglob("*.py"), *(ROOT / "tests").glob("conftest.py")]
    read = {
        name
        for path in sources
        for name in re.findall(r'environ(?:\.\w+)?[\[(]"(\w+)"', path.read_text())
        if not name.startswith("PYTEST")
    }
    assert "SEMIMOE_BACKEND" in read
    assert read <= documented, sorted(read - documented)


def test_hooks_have_the_versions_of_the_constraints() -> None:
    constraints = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    revisions = dict(re.findall(r"(ruff|clang-format)(?:-pre-commit)?\n    rev: v(\S+)", hooks))
    assert revisions == {name: constraints[name] for name in ("ruff", "clang-format")}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
