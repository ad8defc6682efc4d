"""Who hangs: a process that stops making progress is named, and the run ends instead of waiting.

A rank that hangs makes all others wait in a collective, for ever or until a timeout that does not say
whom they waited for. So each process tells a thread of its own what it does, and where that thread
sees no progress for too long, it notes what its process is at in the store that all ranks share. A
rank that waits in `torch.distributed` waits for another; one that is elsewhere, or says nothing, is
the one waited for.
"""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self

HUNG = 3
"""Exit code of a process that ends because a rank hangs."""
_LONGEST_GRACE = 10.0
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
        self._stopped = threading.Event()
        self._watched = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._beat = (time.monotonic(), self._beat[1])
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

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

    def _message(self, doing: str, where: str) -> str:
        noted: dict[int, str] = {}
        # The process that keeps the store may be the one that hangs: then nobody answers.
        asking = threading.Thread(target=self._ask, args=(f"{doing}\n{where}", noted), daemon=True)
        asking.start()
        asking.join(2 * self._grace)
        lines, hung = [], []
        for rank in range(self._world_size):
            if rank not in noted:
                hung.append(rank)
                lines.append(f"  rank {rank} gives no sign")
                continue
            doing, where = noted[rank].split("\n")
            if not where.startswith("waiting"):
                hung.append(rank)
            lines.append(f"  rank {rank}: {doing}, {where}")
        named = (
            f"rank {', '.join(map(str, hung))} hangs" if hung else "all ranks wait for each other"
        )
        return (
            f"error: no progress for {self._timeout:g} seconds (training.timeout_seconds): {named}.\n"
            + "\n".join(lines)
            + "\nThe run ends; run again to go on from its last checkpoint."
        )

    @property
    def _grace(self) -> float:
        """Seconds that ranks may notice later than one another."""
        return min(_LONGEST_GRACE, self._timeout)

    def _ask(self, own: str, noted: dict[int, str]) -> None:
        self._store.set(f"hang/{self._rank}", own)
        deadline = time.monotonic() + self._grace
        while len(noted) < self._world_size and time.monotonic() < deadline:
            for rank in set(range(self._world_size)) - set(noted):
                if self._store.check([f"hang/{rank}"]):
                    noted[rank] = self._store.get(f"hang/{rank}").decode()
            time.sleep(0.05)


def shared_watch(timeout: float) -> Watch:
    """A watch over this process, one of those that torch.distributed connects."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    # There is no public name for the store; a prefix keeps its keys apart from others'.
    store = dist.PrefixStore("watch", _get_default_store())
    store.set_timeout(timedelta(seconds=min(timeout, _LONGEST_GRACE)))
    return Watch(store, dist.get_rank(), dist.get_world_size(), timeout)


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
