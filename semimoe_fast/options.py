"""Command lines that are generated from dataclasses, by tyro.

Tyro is imported only where a command line is read, so that the library, the trainer and the benchmarks work without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

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
    # The annotations are strings until tyro evaluates them in their module, and some of them name tyro.
    vars(sys.modules[options.__module__])["tyro"] = tyro
    return tyro.cli(options, prog=f"python -m {command}", args=arguments, default=default)
