"""How a process that cannot continue reports why, once, as the last message on the terminal.

When a process ends, torchrun prints a traceback of its own and a report of which process failed,
which would push an earlier message out of sight. It includes a message in its report if it finds
nothing but that message in the file named by TORCHELASTIC_ERROR_FILE.
"""

import json
import os
import sys
import time

PATIENCE = 10.0
"""Seconds within which torchrun ends the other processes of a machine after the first one has
ended."""


def tell(message: str, is_first_on_machine: bool) -> None:
    """Report why this process ends; call it right before it does.

    If all processes fail in the same way, the first one on each machine reports for them and the
    others wait to be ended. A process that fails alone is not ended by torchrun, and reports for
    itself.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_first_on_machine:
        time.sleep(PATIENCE)
    if file is None:
        print(f"{_coloured('error:')} {message}", file=sys.stderr)
        return
    told = {
        # torchrun would show the call stack, which tells the user nothing.
        "message": f"error: {message}",
        "extraInfo": {
            "py_callstack": f"\n{_coloured('error:')} {message}",
            "timestamp": str(int(time.time())),
        },
    }
    with open(file, "w", encoding="utf-8") as report:
        json.dump({"message": told}, report)


def _coloured(word: str) -> str:
    is_plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return word if is_plain else f"\x1b[1;31m{word}\x1b[0m"
