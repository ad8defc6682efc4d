"""Finds out which process hangs: it is named and the run ends, instead of waiting for ever.

A rank that hangs makes all others wait in a collective, for ever or until a timeout whose error
does not say which rank they waited for. Each process therefore reports its progress to a thread of
its own. If that thread sees no progress for too long, it writes what its process is doing into the
store that all ranks share. A rank inside `torch.distributed` waits for another one; a rank that is
elsewhere, or does not report, is the one that hangs. A stopped process (SIGSTOP) cannot report
anything, so each process also regularly notes what it is doing.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

HUNG = 3
"""Exit code of a process that ends because a rank hangs."""
_LONGEST_GRACE = 10.0
_NOTES_PER_TIMEOUT = 5
_COMMUNICATION = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication.py")
"""Code that waits for other ranks. A line that waits for a device or a work handle counts too."""


class Store(Protocol):
    """The part of torch.distributed's store interface that is used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Watch:
    """Ends this process with a message if it makes no progress; use it as a context manager.

    Args:
        store: shared by all ranks.
        rank: of this process.
        world_size: number of ranks.
        timeout: seconds without a beat after which a process counts as hung.
        end: called with the message; by default the process ends with code `HUNG`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout, self._end = timeout, end or _end
        self._beat = (time.monotonic(), "starting")
        self._answered = _now()
        self._stopped = threading.Event()
        self._watched = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        # A thread of its own, because the process that keeps the store may stop, and then writing a
        # note never returns.
        self._noting = threading.Thread(target=self._note, name="watch notes", daemon=True)

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._beat = (time.monotonic(), self._beat[1])
        self._thread.start()
        self._noting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._noting.join(1.0)  # not for ever: the store may be stopped

    def beat(self, doing: str) -> None:
        """Report that this process makes progress, starting something that takes less than the
        timeout.
        """
        self._beat = (time.monotonic(), doing)

    def _run(self) -> None:
        while True:
            since, doing = self._beat
            left = since + self._timeout - time.monotonic()
            if self._stopped.wait(max(left, 0.01)):
                return
            if self._beat[0] == since and left <= 0:
                break
        where = _where(self._watched)
        self._end(self._message(doing, where))

    def _note(self) -> None:
        """Note regularly for the other ranks that this process runs, and what it is doing."""
        while True:
            with contextlib.suppress(Exception):  # a lost note is no reason to end a run
                self._store.set(f"runs/{self._rank}", f"{_now()}\n{self._beat[1]}")
                self._answered = _now()
            if self._stopped.wait(self._timeout / _NOTES_PER_TIMEOUT):
                return

    def _message(self, doing: str, where: str) -> str:
        found = _Found()
        # The process that keeps the store may be the one that hangs, and then nobody answers.
        asking = threading.Thread(target=self._ask, args=(f"{doing}\n{where}", found), daemon=True)
        asking.start()
        asking.join(2 * self._grace)
        # If the store stopped answering after it had returned notes of other ranks, rank 0 has
        # reported what it found and ended first.
        is_told = found.is_whole or len(found.stuck) > 1
        named, lines = self._named(found) if is_told else self._without_store(doing, where)
        return (
            f"error: no progress for {self._timeout:g} seconds (training.timeout_seconds): {named}.\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nThe run ends; run again to resume from its last checkpoint."
        )

    def _named(self, found: "_Found") -> tuple[str, list[str]]:
        """Which rank hangs, and a line about each rank."""
        lines, hung = [], []
        for rank in range(self._world_size):
            if rank in found.stuck:
                doing, where = found.stuck[rank].split("\n")
                is_waiting = where.startswith("waiting")
                lines.append(f"rank {rank}: {doing}, {where}")
            else:
                last, is_waiting = "", False
                if rank in found.running:
                    when, doing = found.running[rank].split("\n")
                    last = f" since {when} ({doing})"
                lines.append(f"rank {rank} has not responded{last}")
            if not is_waiting:
                hung.append(rank)
        if not hung:
            return "all ranks wait for each other", lines
        return f"rank {', '.join(map(str, hung))} hangs", lines

    def _without_store(self, doing: str, where: str) -> tuple[str, list[str]]:
        """The same if the store does not answer: rank 0, or the torchrun that started it, keeps the
        store.
        """
        return "rank 0 hangs", [
            "rank 0, or the torchrun that started it, which keeps what the ranks tell each other, "
            f"has not responded since {self._answered}",
            f"rank {self._rank}: {doing}, {where}",
        ]

    @property
    def _grace(self) -> float:
        """Seconds by which ranks may notice a hang later than one another."""
        return min(_LONGEST_GRACE, self._timeout)

    def _ask(self, own: str, found: "_Found") -> None:
        self._store.set(f"hang/{self._rank}", own)
        self._look("runs", found.running)
        deadline = time.monotonic() + self._grace
        while len(found.stuck) < self._world_size and time.monotonic() < deadline:
            self._look("hang", found.stuck)
            time.sleep(0.05)
        if self._rank == 0:  # the store may end with this process, so let the others read it
            time.sleep(0.1 * self._grace)
        found.is_whole = True

    def _look(self, what: str, into: dict[int, str]) -> None:
        for rank in set(range(self._world_size)) - set(into):
            if self._store.check([f"{what}/{rank}"]):
                into[rank] = self._store.get(f"{what}/{rank}").decode()


@dataclass
class _Found:
    """What the ranks wrote into the store, by rank."""

    stuck: dict[int, str] = field(default_factory=dict)
    """Ranks that see no progress: what they are doing, and where."""
    running: dict[int, str] = field(default_factory=dict)
    """The last note of each rank: when it was written, and what the rank was doing."""
    is_whole: bool = False
    """Whether the store answered every question."""


def shared_watch(timeout: float, end: Callable[[str], None] | None = None) -> Watch:
    """A watch over this process, sharing the store that torch.distributed uses."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    # There is no public name for the store; a prefix keeps our keys apart from others'. It needs a
    # connection of its own, because a call blocks while the process itself waits for an answer over
    # the same connection.
    store = PrefixStore("watch", _get_default_store()).clone()
    store.set_timeout(timedelta(seconds=min(timeout, _LONGEST_GRACE)))
    return Watch(store, dist.get_rank(), dist.get_world_size(), timeout, end)


def _now() -> str:
    return f"{datetime.now(UTC):%H:%M:%S} UTC"


def _where(thread: int | None) -> str:
    """What a thread is doing: `waiting for other ranks in ...`, or `in <function>, <file>:<line>`."""
    frame = sys._current_frames().get(thread or -1)
    stack = traceback.extract_stack(frame)
    if not stack:
        return "in no Python code"
    ours = next(
        (f for f in reversed(stack) if f"{os.sep}site-packages{os.sep}" not in f.filename),
        stack[-1],
    )
    place = f"{ours.name}, {os.path.basename(ours.filename)}:{ours.lineno}"
    is_waiting = any(part in stack[-1].filename for part in _COMMUNICATION) or re.search(
        r"\b(wait|synchronize|item|tolist)\(", stack[-1].line or ""
    )
    return f"waiting for other ranks in {place}" if is_waiting else f"in {place}"


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(HUNG)  # the process itself is in a call that cannot be interrupted
