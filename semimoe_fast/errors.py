"""Errors that a user can cause and mend, and how the command line shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; what the user or the system can cause becomes one line, without a traceback."""
    try:
        main()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        _leave(f"error: {explain(error)}", 2)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def explain(error: UserError | OSError) -> str:
    """The error in one line."""
    if isinstance(error, UserError):
        return str(error)
    return f"{error.filename or 'the system'}: {error.strerror or error}; give a place that can be used"


def _leave(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
