"""How a process that cannot go on says why, so that it is the last thing on the terminal, once.

torchrun answers the end of a process with a traceback of its own and a report of who failed, and
would push a message that was printed before out of sight. It takes a message into the report from
the file that TORCHELASTIC_ERROR_FILE names, where that is all that stands behind the traceback.
"""

import json
import os
import sys
import time

PATIENCE = 10.0
"""Seconds in which torchrun ends the other processes of a machine once the first one has ended."""


def tell(message: str, is_first_on_machine: bool) -> None:
    """Say why this process ends; call it right before it does.

    Where all processes fail alike, the first one of each machine speaks for them: the others wait
    to be ended. One that fails alone is not ended, and speaks too.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_first_on_machine:
        time.sleep(PATIENCE)
    if file is None:
        print(f"{_coloured('error:')} {message}", file=sys.stderr)
        return
    told = {
        # What torchrun shows is the call stack, which would say nothing to the user.
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
