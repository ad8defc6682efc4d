"""How a process that cannot continue reports why, once, as the last message on the terminal.

When a process ends, torchrun prints a traceback of its own and a report of which process failed,
which would push an earlier message out of sight. A process therefore writes its message to the file
named by TORCHELASTIC_ERROR_FILE. Our launcher (`torchrun.py`) prints this message and nothing else; a
plain torchrun shows it at the end of its report.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from mor_tools import terminal

PATIENCE = 10.0
"""Seconds within which torchrun ends the other processes of a machine after the first one has
ended."""
_KEY = "mor_tools"
"""Marks the reports of this module; those of other programs lack it."""


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
        print(terminal.error(message), file=sys.stderr)
        return
    told = {
        # A plain torchrun shows the call stack, which tells the user nothing.
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
