"""Command lines from dataclasses, and the package without tyro."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest

from semimoe_fast import train
from semimoe_fast.errors import UserError
from semimoe_fast.options import read_options
from semimoe_fast.training import command_line
from semimoe_fast.training.config import TrainConfig

ROOT = Path(__file__).parents[1]

# Every module of the package and, in the source tree, the scripts of the benchmarks.
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
from pathlib import Path
sys.modules["tyro"] = None
import semimoe_fast.train, semimoe_fast.training.run, semimoe_fast.data.readers
assert not sys.modules.keys() & {"tifffile", "imagecodecs", "openslide"}, "the training recipe reads no large images"
names = [module.name for module in pkgutil.walk_packages(semimoe_fast.__path__, "semimoe_fast.")]
names += [f"benchmarks.{path.stem}" for path in Path("benchmarks").glob("*.py")]
if importlib.util.find_spec("monai") is None:
    names.remove("semimoe_fast.monai")
for name in names:
    if not name.startswith("semimoe_fast.kernels"):
        importlib.import_module(name)
assert "semimoe_fast.training.trainer" in names
"""


def test_all_modules_import_without_tyro() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_without_tyro_raises_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(UserError, match="tyro, which reads the options of commands, is not installed: run `pip"):
        command_line.parse([])


def test_parsed_options_equal_the_configuration(tiny: list[str], tiny_config: TrainConfig) -> None:
    assert command_line.parse(tiny) == tiny_config


def test_recipe_changes_defaults_that_options_override(tiny: list[str], tiny_config: TrainConfig) -> None:
    strong = command_line.parse([*tiny, "--recipe", "strong"])
    changed = {f.name for f in dataclasses.fields(strong) if getattr(strong, f.name) != getattr(tiny_config, f.name)}
    given = {option[2:].replace("-", "_") for option in tiny if option.startswith("--")}
    assert changed == command_line.RECIPES["strong"].keys() - given
    assert command_line.parse([*tiny, "--recipe=strong", "--schedule", "steps"]).schedule == "steps"
    assert command_line.parse([*tiny, "--recipe", "strong", "--ema", "None"]).ema is None
    assert command_line.parse([*tiny, "--recipe", "published"]) == tiny_config


def test_the_page_has_the_values_of_the_recipe() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `--(\S+)` \| (\S+) \| (\S+) \| ", page.split("## Recipes")[1].split("\n## ")[0], re.M)
    default = TrainConfig()
    strong = command_line.RECIPES["strong"].items()
    expected = [(name.replace("_", "-"), str(getattr(default, name)), str(value)) for name, value in strong]
    assert rows == expected


def test_resumed_run_takes_no_recipe(finished: Path) -> None:
    with pytest.raises(UserError, match="--recipe is for a new run: leave it out"):
        command_line.parse(["--resume", str(finished), "--recipe", "published"])


def test_main_checks_a_configuration() -> None:
    with pytest.raises(UserError, match="--width is 0"):
        train.main(TrainConfig(width=0))


def test_help_is_grouped_and_shows_placeholders_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit):
        command_line.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    groups = ("recipe", "data", "augmentation", "model", "schedule", "loss", "computing", "output")
    assert sorted(groups, key=lambda group: text.index(f"{group} options")) == list(groups)
    assert "--data DIR Folder of the parts, each PART/image and PART/mask. (default: synthetic glands)" in text
    assert "--ema DECAY" in text
    assert "--threads INT Number of CPU threads. (default: 1)" in text  # the default of synthetic glands is not None


def test_every_training_option_has_one_line_of_help(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    pytest.importorskip("tyro")
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        command_line.parse(["--data", "DIR", "--help"])
    lines = [line.strip(" │|") for line in capsys.readouterr().out.splitlines() if "(default: " in line]
    assert len(lines) == len(dataclasses.fields(command_line.CommandLine))
    assert [line for line in lines if not re.fullmatch(r"(--\S+ .*)?[A-Z].*\(default: .*\)", line)] == []


@dataclasses.dataclass(frozen=True)
class Ungrouped:
    """A command."""

    path: Annotated[Path, "FILE"]
    count: Annotated[int | None, "INT", "all"] = None


def test_parsing_leaves_the_dataclass_unchanged() -> None:
    pytest.importorskip("tyro")
    before = get_type_hints(Ungrouped, include_extras=True)
    assert read_options(Ungrouped, "command", ["--path", "a", "--count", "2"]) == Ungrouped(Path("a"), 2)
    assert get_type_hints(Ungrouped, include_extras=True) == before
