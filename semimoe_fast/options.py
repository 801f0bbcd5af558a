"""Command lines that are generated from dataclasses, by tyro.

Tyro is imported only where a command line is read, so that the library, the trainer and the benchmarks work without it.
In the dataclasses, Annotated[int | None, "INT"] says what the help text shows for the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar, get_origin, get_type_hints

from .errors import UserError

Options = TypeVar("Options")


def read_options(
    options: type[Options], command: str, arguments: Sequence[str] | None = None, default: Options | None = None
) -> Options:
    """The options that a command line gives: `arguments`, or those of the process; exits by itself for --help.

    options: a dataclass; command: its name in the help text; default: what the options are where nothing is given.
    Raises UserError where tyro is missing.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        raise UserError("tyro, which reads the options of commands, is not installed: run `pip install tyro`") from None
    for name, hint in get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is Annotated:
            marks = [tyro.conf.arg(metavar=mark) if isinstance(mark, str) else mark for mark in hint.__metadata__]
            options.__annotations__[name] = Annotated[hint.__origin__, *marks]
    return tyro.cli(options, prog=f"python -m {command}", args=arguments, default=default)
