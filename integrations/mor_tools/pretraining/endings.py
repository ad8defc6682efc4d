"""How a process that cannot continue says why, so that the user reads it last, and once.

When a process ends, torchrun prints a traceback of its own and a report of who failed, and would push
a message that was printed before out of sight. A process therefore hands its message over, in the file
that TORCHELASTIC_ERROR_FILE names. Our launcher (`torchrun.py`) prints it, and nothing else. A plain
torchrun shows it at the end of its report.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from mor_tools import terminal

PATIENCE = 10.0
"""Seconds in which torchrun ends the other processes of a machine once the first one has ended."""
_KEY = "mor_tools"
"""Marks the reports of this module; those of other programs lack it."""


def tell(message: str, is_first_on_machine: bool) -> None:
    """Say why this process ends; call it right before it does.

    Where all processes fail alike, the first one of each machine speaks for them: the others wait
    to be ended. One that fails alone is not ended, and speaks too.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_first_on_machine:
        time.sleep(PATIENCE)
    if file is None:
        print(terminal.error(message), file=sys.stderr)
        return
    told = {
        # What a plain torchrun shows is the call stack, which would say nothing to the user.
        "message": f"error: {message}",
        "extraInfo": {
            "py_callstack": f"\n{terminal.error(message)}",
            "timestamp": str(int(time.time())),
            _KEY: message,
        },
    }
    with open(file, "w", encoding="utf-8") as report:
        json.dump({"message": told}, report)


def told(report: Mapping[str, Any]) -> str | None:
    """The message that a process handed over with `tell`, or None.

    Args:
        report: the contents of its error file, as `ProcessFailure.error_file_data` has them.
    """
    details = report.get("message")
    if not isinstance(details, dict):
        return None
    return details.get("extraInfo", {}).get(_KEY)
