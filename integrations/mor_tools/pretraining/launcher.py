"""The torchrun that started this process, without which nobody would restart or end the process.

A process whose torchrun was killed would go on training unnoticed. Each process therefore asks the
kernel for a signal when its parent ends, where the kernel supports that (Linux), and checks its
parent at every step.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import sys

SIGNAL = signal.SIGUSR2
"""Signal sent when the parent ends. Not SIGTERM, by which users and schedulers ask for a
checkpoint."""
_PR_SET_PDEATHSIG = 1


class LauncherLost(RuntimeError):
    """The torchrun that started a process of this run has ended."""

    def __init__(self, what_happened: str) -> None:
        super().__init__(
            "torchrun, which started this run's processes, has ended on one of the machines. "
            f"{what_happened} Run the command again to continue."
        )


class Launcher:
    """The parent that this process has now."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    @property
    def is_gone(self) -> bool:
        """Whether the parent has changed, which happens when the first one ends."""
        return os.getppid() != self._parent


def command(*changes: str, with_mor: bool = False) -> str | None:
    """The command line that starts this process's run again on one machine.

    It is None without torchrun, and on several machines, because how their launchers find one
    another is not known here.

    Args:
        changes: settings as `key=value`, appended so that they take precedence.
        with_mor: whether the command `mor` may be taken for granted. Otherwise the line also works in
            a shell that does not find it.
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
        if with_mor:
            return shlex.join(["mor", *start[2:], *own, *changes])
    else:  # a script of the user's
        module = "mor_tools.pretraining.torchrun"
        start = ["-m", module, "--standalone", "--nproc-per-node", processes]
    line = shlex.join([python, *start, *own, *changes])
    # Needed in a checkout, but not in an installation.
    path = os.environ.get("PYTHONPATH")
    return line if path is None else f"PYTHONPATH={shlex.quote(path)} {line}"


def follow() -> None:
    """Raise `LauncherLost` in the main thread when the parent ends, until another handler is set."""
    launcher = Launcher()

    def stop(number: int, frame: object) -> None:
        raise LauncherLost("The run ends before its first step.")

    signal.signal(SIGNAL, stop)
    if sys.platform == "linux":
        with contextlib.suppress(
            OSError, AttributeError
        ):  # then only the check at every step remains
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, SIGNAL.value, 0, 0, 0)
    if launcher.is_gone:  # the parent ended before the kernel was asked
        stop(SIGNAL, None)
