"""Errors that a user can cause and mend, and how the command line shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point: a UserError becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
