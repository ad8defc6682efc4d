"""How errors look on a terminal."""

import os
import sys


def error(message: str) -> str:
    """The text of an error, whose first word is red where standard error is a terminal."""
    is_plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return f"error: {message}" if is_plain else f"\x1b[1;31merror:\x1b[0m {message}"
