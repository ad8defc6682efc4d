"""What all tools show alike on a terminal: errors, and that they are at work."""

import contextlib
import os
import sys
from collections.abc import Iterator


def error(message: str) -> str:
    """The text of an error, whose first word is red where standard error is a terminal."""
    is_plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return f"error: {message}" if is_plain else f"\x1b[1;31merror:\x1b[0m {message}"


@contextlib.contextmanager
def working(doing: str) -> Iterator[None]:
    """Show what is being done while it lasts, on a terminal that has the package rich."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        yield
        return
    with Console(stderr=True).status(f"{doing} ..."):
        yield
