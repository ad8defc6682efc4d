"""Who hangs: a process that stops making progress is named, and the run ends instead of waiting.

A rank that hangs makes all others wait in a collective, for ever or until a timeout that does not say
whom they waited for. So each process tells a thread of its own what it does, and where that thread
sees no progress for too long, it notes what its process is at in the store that all ranks share. A
rank that waits in `torch.distributed` waits for another; one that is elsewhere, or says nothing, is
the one waited for. A stopped process cannot say since when: so each notes now and then what it does.
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
"""Code that waits for other ranks; besides, a line that waits for a device or a handle."""


class Store(Protocol):
    """What the ranks share, as torch.distributed's stores do."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Watch:
    """Ends this process with a message where it makes no progress; use it as a context manager.

    Args:
        store: shared by all ranks.
        rank: of this process.
        world_size: number of ranks.
        timeout: seconds without a beat that count as hung.
        end: what to do with the message; by default the process ends with code `HUNG`.
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
        # Of its own: the process that keeps the store may stop, and then a note never returns.
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
        self._noting.join(1.0)  # not for ever, where the store is stopped

    def beat(self, doing: str) -> None:
        """This process goes on, with something that takes less than the timeout."""
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
        """Tells the other ranks now and then that this process runs, and at what."""
        while True:
            with contextlib.suppress(Exception):  # a lost note is no reason to end a run
                self._store.set(f"runs/{self._rank}", f"{_now()}\n{self._beat[1]}")
                self._answered = _now()
            if self._stopped.wait(self._timeout / _NOTES_PER_TIMEOUT):
                return

    def _message(self, doing: str, where: str) -> str:
        found = _Found()
        # The process that keeps the store may be the one that hangs: then nobody answers.
        asking = threading.Thread(target=self._ask, args=(f"{doing}\n{where}", found), daemon=True)
        asking.start()
        asking.join(2 * self._grace)
        # Without an end, but with others' answers: rank 0 told what it found, and ended before.
        is_told = found.is_whole or len(found.stuck) > 1
        named, lines = self._named(found) if is_told else self._without_store(doing, where)
        return (
            f"error: no progress for {self._timeout:g} seconds (training.timeout_seconds): {named}.\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nThe run ends; run again to go on from its last checkpoint."
        )

    def _named(self, found: "_Found") -> tuple[str, list[str]]:
        """Who hangs, and a line on each rank."""
        lines, hung = [], []
        for rank in range(self._world_size):
            if rank in found.stuck:
                doing, where = found.stuck[rank].split("\n")
                lines.append(f"rank {rank}: {doing}, {where}")
            else:
                last = ""
                if rank in found.running:
                    when, doing = found.running[rank].split("\n")
                    last = f" since {when} ({doing})"
                lines.append(f"rank {rank} gives no sign{last}")
            if rank not in found.stuck or not where.startswith("waiting"):
                hung.append(rank)
        if not hung:
            return "all ranks wait for each other", lines
        return f"rank {', '.join(map(str, hung))} hangs", lines

    def _without_store(self, doing: str, where: str) -> tuple[str, list[str]]:
        """The same where nobody can be asked: the store is kept by rank 0, or started with it."""
        return "rank 0 hangs", [
            f"rank 0, or the torchrun that started it, which keep what ranks tell each other, give no "
            f"sign since {self._answered}",
            f"rank {self._rank}: {doing}, {where}",
        ]

    @property
    def _grace(self) -> float:
        """Seconds that ranks may notice later than one another."""
        return min(_LONGEST_GRACE, self._timeout)

    def _ask(self, own: str, found: "_Found") -> None:
        self._store.set(f"hang/{self._rank}", own)
        self._look("runs", found.running)
        deadline = time.monotonic() + self._grace
        while len(found.stuck) < self._world_size and time.monotonic() < deadline:
            self._look("hang", found.stuck)
            time.sleep(0.05)
        if self._rank == 0:  # the store may end with this process: let the others read
            time.sleep(0.1 * self._grace)
        found.is_whole = True

    def _look(self, what: str, into: dict[int, str]) -> None:
        for rank in set(range(self._world_size)) - set(into):
            if self._store.check([f"{what}/{rank}"]):
                into[rank] = self._store.get(f"{what}/{rank}").decode()


@dataclass
class _Found:
    """What the ranks told, by rank."""

    stuck: dict[int, str] = field(default_factory=dict)
    """Of those that see no progress: what they do, and where."""
    running: dict[int, str] = field(default_factory=dict)
    """The last note of each: when, and what it did."""
    is_whole: bool = False
    """Whether the store answered every question."""


def shared_watch(timeout: float, end: Callable[[str], None] | None = None) -> Watch:
    """A watch over this process, one of those that torch.distributed connects."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    # There is no public name for the store; a prefix keeps its keys apart from others'. A connection
    # of its own, since a call waits while the process itself waits for an answer over the same one.
    store = PrefixStore("watch", _get_default_store()).clone()
    store.set_timeout(timedelta(seconds=min(timeout, _LONGEST_GRACE)))
    return Watch(store, dist.get_rank(), dist.get_world_size(), timeout, end)


def _now() -> str:
    return f"{datetime.now(UTC):%H:%M:%S} UTC"


def _where(thread: int | None) -> str:
    """What a thread is at: `waiting for other ranks in ...`, or `in <function>, <file>:<line>`."""
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
    os._exit(HUNG)  # the process itself sits in a call that nothing interrupts
