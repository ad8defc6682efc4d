"""Commands whose standard error is a terminal."""

import os
import pty
import subprocess
from collections.abc import Sequence

from tests.mor_tools.pretraining.runs import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}


def on_a_terminal(command: Sequence[str]) -> tuple[int, str]:
    """Exit status of a command, and what a terminal as its standard error shows."""
    terminal, end = pty.openpty()
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command, env=environment | {"TERM": "xterm"}, stdout=subprocess.DEVNULL, stderr=end
    )
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # how Linux reports that the other end is closed
        pass
    os.close(terminal)
    return process.wait(), shown.decode().replace("\r\n", "\n")
