"""The torchrun that started this process: without it nobody would restart or end the process.

A process whose torchrun was killed would train on, out of sight. So it asks the kernel for a signal
when its parent ends, where the kernel has such a thing (Linux), and compares its parent at each step.
"""

import contextlib
import ctypes
import os
import shlex
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


def command(*changes: str) -> str | None:
    """The command line that starts this process's run again on one machine.

    None without torchrun, and on several machines, whose launchers agree in ways not known here.

    Args:
        changes: settings as `key=value`, which go last and so count.
    """
    is_on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if "TORCHELASTIC_RUN_ID" not in os.environ or not is_on_one_machine:
        return None
    python, *rest = sys.orig_argv
    names = {change.partition("=")[0] for change in changes}
    own = [a for a in rest if a != "-u" and a.partition("=")[0] not in names]  # torchrun adds -u
    processes = os.environ["LOCAL_WORLD_SIZE"]
    if own[:2] == ["-m", "mor_tools.pretraining"]:
        start, own = ["-m", "mor_tools.commands", "pretrain", "--processes", processes], own[2:]
    else:  # a script of the user's
        module = "mor_tools.pretraining.torchrun"
        start = ["-m", module, "--standalone", "--nproc-per-node", processes]
    line = shlex.join([python, *start, *own, *changes])
    # What a checkout needs and an installation does not.
    path = os.environ.get("PYTHONPATH")
    return line if path is None else f"PYTHONPATH={shlex.quote(path)} {line}"


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
