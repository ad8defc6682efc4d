"""The torchrun that started this process: without it nobody would restart or end the process.

A process whose torchrun was killed would train on, out of sight. So it asks the kernel for a signal
when its parent ends, where the kernel has such a thing (Linux), and compares its parent at each step.
"""

import contextlib
import ctypes
import os
import signal
import sys

SIGNAL = signal.SIGUSR2
"""Sent when the parent ends. Not SIGTERM, which also those send who want a checkpoint first."""
_PR_SET_PDEATHSIG = 1


class LauncherLost(RuntimeError):
    """The torchrun that started a process of this run is gone."""

    def __init__(self, what_happened: str) -> None:
        super().__init__(
            f"torchrun, which started this run's processes, is gone on a machine. {what_happened} "
            "Run again to go on."
        )


class Launcher:
    """The parent of this process, as of now."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    @property
    def is_gone(self) -> bool:
        """Whether another process has become the parent, which happens when the first one ends."""
        return os.getppid() != self._parent


def follow() -> None:
    """Raise `LauncherLost` in the main thread when the parent ends, until another handler is set."""
    launcher = Launcher()

    def stop(number: int, frame: object) -> None:
        raise LauncherLost("The run ends before a step was taken.")

    signal.signal(SIGNAL, stop)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # then the comparison must do
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, SIGNAL.value, 0, 0, 0)
    if launcher.is_gone:  # before the kernel was asked
        stop(SIGNAL, None)
