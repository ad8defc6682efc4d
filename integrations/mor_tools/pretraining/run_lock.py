"""One run at a time in a folder: a lock that names its holder and does not stay closed after a
crash.

The lock is a file in the run's folder. It names the process that holds it, and that process touches
the file regularly. Other processes can thus tell whether the holder is alive: on the same machine
by its process id and start time (because ids are reused), on another machine by the age of the last
touch. Both times come from the file system, so that clocks need not agree. A run that torchrun
restarts, perhaps with its first rank on another machine, is recognised by its torchrun processes,
which are the same as before.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

NAME = "run.lock"
LOST = 4
"""Exit code of a process whose lock was taken by another process."""
_TOUCH_EVERY = 20.0
_STALE_AFTER = 180.0  # nine touches; a file server that is away for longer also ends the run


@dataclass(frozen=True)
class Holder:
    """The holder of a folder, as the lock file names it."""

    token: str
    """Distinguishes this lock from all others."""
    host: str
    machine: str
    """Host, boot and namespace of process ids, within which `pid` is unique."""
    pid: int
    started: str
    """When the process started, in clock ticks of its machine; empty if unknown."""
    since: str
    launchers: tuple[str, ...]
    """The torchrun processes of the run (see `launcher`)."""


class RunLock:
    """The lock of a run's folder.

    Args:
        folder: of the run; created if it does not exist.
        launchers: of all ranks (see `launcher`).
        lost: called with a message if the lock is lost; by default the process ends.
        touch_every, stale_after: seconds.
    """

    def __init__(
        self,
        folder: Path,
        launchers: Sequence[str] = (),
        lost: Callable[[str], None] | None = None,
        touch_every: float = _TOUCH_EVERY,
        stale_after: float = _STALE_AFTER,
    ) -> None:
        self._folder, self._file, self._lost = folder, folder / NAME, lost or _end
        self._touch_every, self._stale_after = touch_every, stale_after
        self._holder = Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            launchers=tuple(sorted(set(launchers))),
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)

    def acquire(self) -> str | None:
        """Take the lock; returns a sentence if it was taken over from a dead run.

        Raises:
            ValueError: another run holds it.
            OSError: the folder cannot be written.
        """
        # Written completely under another name first: a hard link appears atomically, and fails if
        # the lock exists.
        mine = self._folder / f".{NAME}.{self._holder.token}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            mine.write_text(json.dumps(asdict(self._holder)), "utf-8")
        except OSError as error:
            raise OSError(
                f"output={self._folder} cannot be written: {error}. Choose another output=, or "
                "change its permissions."
            ) from error
        try:
            note = None
            while not _linked(mine, self._file):
                note = self._take_away(mine) or note
        finally:
            mine.unlink(missing_ok=True)
        self._thread.start()
        return note

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)  # not for ever: the file server may not answer
        with contextlib.suppress(OSError):  # the next run sees that this process has ended
            if self._is_ours():
                self._file.unlink()

    def _take_away(self, mine: Path) -> str | None:
        """Remove the lock of a run that has ended; raises ValueError if the run is alive."""
        try:
            found = self._file.read_bytes()
            # # Both times are the file server's.
            os.utime(mine)
            age = mine.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:
            return None  # it was released just now
        holder = _parsed(found)
        if self._is_held(holder, age):
            raise ValueError(self._refusal(holder, age))
        if not self._remove(found, mine):
            return None
        if holder is None or set(holder.launchers) & set(self._holder.launchers):
            return None
        return (
            f"{self._folder} was left locked by a run on {holder.host} (process {holder.pid}, "
            f"since {holder.since}) that has ended without releasing it; it is taken over."
        )

    def _remove(self, found: bytes, mine: Path) -> bool:
        """Remove the lock with this content, unless another process does so; returns whether we did."""
        # One process at a time: otherwise a slow one could remove the lock that a quick one has created
        # in the place of the one that both have found.
        turn = self._folder / f".{NAME}.turn"
        if not _linked(mine, turn):
            with contextlib.suppress(
                FileNotFoundError
            ):  # a process that died leaves its turn behind
                if mine.stat().st_mtime - turn.stat().st_mtime > self._stale_after:
                    turn.unlink()
            time.sleep(0.01)
            return False
        try:
            if self._file.read_bytes() != found:
                return False
            self._file.unlink()
        except FileNotFoundError:
            return False
        finally:
            turn.unlink(missing_ok=True)
        return True

    def _is_held(self, holder: Holder | None, age: float) -> bool:
        if holder is not None and holder.machine == self._holder.machine:
            return _started(holder.pid) == holder.started
        if holder is not None and set(holder.launchers) & set(self._holder.launchers):
            # torchrun restarts processes only after all earlier ones have ended, on all machines.
            return False
        return age < self._stale_after

    def _refusal(self, holder: Holder | None, age: float) -> str:
        who = "another run"
        if holder is not None:
            who = f"a run on {holder.host} (process {holder.pid}, since {holder.since})"
        return (
            f"{self._folder} is in use by {who}, which last touched its lock {max(age, 0):.0f} "
            "seconds ago. Two runs in one folder would damage each other's checkpoints. Wait "
            "until it ends, or choose another output=. If that run has certainly ended, remove "
            f"{self._file} and start again; on another machine it counts as ended "
            f"{self._stale_after:.0f} seconds after it last touched its lock."
        )

    def _touch(self) -> None:
        while not self._over.wait(self._touch_every):
            with contextlib.suppress(OSError):  # of the file server; the next touch may succeed
                if self._is_ours():
                    os.utime(self._file)
                    continue
                self._lost(
                    f"error: {self._file} was removed, or replaced by another run's lock. This run "
                    "ends at once, so that two runs do not write into one folder. Its work since "
                    "its last checkpoint is lost."
                )
                return

    def _is_ours(self) -> bool:
        try:
            holder = _parsed(self._file.read_bytes())
        except FileNotFoundError:
            return False
        return holder is not None and holder.token == self._holder.token


def launcher() -> str:
    """Identifies the torchrun that started this process: equal for all its processes, and for no
    others.
    """
    parent = os.getppid()
    return f"{_machine()}/{parent}/{_started(parent)}"


def _linked(source: Path, target: Path) -> bool:
    """Whether the file could be given another name, which fails if that name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def _parsed(content: bytes) -> Holder | None:
    """The holder named in a lock file; None if the content is not valid, for instance still being
    written.
    """
    try:
        values = json.loads(content)
        return Holder(**values | {"launchers": tuple(values["launchers"])})
    except (ValueError, TypeError, KeyError):
        return None


def _machine() -> str:
    """Where a process id is unique: containers may share a host name or a boot with their host."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _started(pid: int) -> str | None:
    """When a process started; None if it is not running, empty if its start time is unknown."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # # The name, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(LOST)
