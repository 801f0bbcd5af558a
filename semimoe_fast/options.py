"""Command lines that tyro generates from dataclasses.

Only `read_options` imports tyro, so that the library, the trainer and the benchmarks work without it.

A dataclass gives the help texts: a docstring under each field, and Annotated[int | None, "INT", "one per core"] for
the placeholder of the value and the text that the help shows for the default None. The help groups the options of a
dataclass by the dataclasses that it inherits from, the last base first: class DataOptions makes the group
"data options".
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from .errors import UserError

Options = TypeVar("Options")


def read_options(
    options: type[Options], command: str, arguments: Sequence[str] | None = None, default: Options | None = None
) -> Options:
    """Parse a command line into an instance of a dataclass; --help prints the options and exits.

    command: module name that the help shows after `python -m`. arguments: sys.argv[1:] if None.
    default: values of the options that the command line leaves out; if None, the defaults of the fields.
    Raises UserError if tyro is not installed.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        raise UserError("tyro, which reads the options of commands, is not installed: run `pip install tyro`") from None
    groups = {_title(base): _view(base, tyro) for base in reversed(options.__bases__) if dataclasses.is_dataclass(base)}
    if groups:
        namespace = {"__doc__": options.__doc__}
        shown = dataclasses.make_dataclass(options.__name__, groups.items(), namespace=namespace)
        markers = (tyro.conf.OmitArgPrefixes,)
        start = None if default is None else shown(**{name: _copy(default, view) for name, view in groups.items()})
    else:
        shown, markers = _view(options, tyro), ()
        start = None if default is None else _copy(default, shown)
    given = tyro.cli(shown, prog=f"python -m {command}", args=arguments, default=start, config=markers)
    parts = [getattr(given, name) for name in groups] or [given]
    return options(**{name: value for part in parts for name, value in _values(part).items()})


def training_command(data: Path, semi_supervised: bool, more: str = "") -> str:
    """The last line of a command that has laid out a data folder, with unlabeled images or without.

    more: further options.
    """
    alone = "" if semi_supervised else " --unlabeled none"
    return f"train with: python -m semimoe_fast.train --data {shlex.quote(str(data))}{alone}{more}"


def require_empty(folder: Path) -> None:
    """Raise UserError unless --out is missing or an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another --out")


def require_writable(option: str, path: Path) -> None:
    """Raise UserError if a file cannot be created or replaced at a path."""
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}: create it first")
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: give a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} is {path}, which is a device or a pipe: give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} is {path}, but you may not write into {path.parent}: give another file")


def _title(group: type) -> str:
    """The name of a group in the help, to which tyro appends "options": "data" for class DataOptions."""
    return group.__name__.removesuffix("Options").lower()


def _view(options: type, tyro: ModuleType) -> type:
    """A subclass whose annotations are in tyro's form; the class itself does not change."""
    hints, fields = get_type_hints(options, include_extras=True), []
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            metavar, *none = hint.__metadata__
            argument = tyro.conf.arg(metavar=metavar, help_behavior_hint=_hint(none[0]) if none else None)
            fields.append((field.name, Annotated[hint.__origin__, argument], dataclasses.field(default=field.default)))
    frozen = options.__dataclass_params__.frozen
    return dataclasses.make_dataclass(
        options.__name__, fields, bases=(options,), namespace={"__doc__": options.__doc__}, frozen=frozen
    )


def _hint(none: str) -> Callable[[str], str]:
    """How the help shows a default: `none` instead of None."""
    return lambda default: f"(default: {none if default == 'None' else default})"


def _values(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _copy(source: Any, target: type[Options]) -> Options:
    """An instance of `target` with the values of the fields that `source` has under the same names."""
    return target(**{field.name: getattr(source, field.name) for field in dataclasses.fields(target)})
