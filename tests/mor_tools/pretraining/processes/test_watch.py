"""A process without progress is named by the others, and ends instead of waiting for ever."""

import os
import re
import select
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from mor_tools.pretraining.watch import Watch, shared_watch
from tests.distributed.pool import WorkerPool


class Store:
    """A store as torch.distributed's, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class StoreOfAStoppedProcess(Store):
    """Its keeper does not run, so no call comes back."""

    def set(self, key: str, value: str) -> None:
        time.sleep(60)


def read_slowly(over: threading.Event) -> None:
    while not over.is_set():
        time.sleep(0.01)


def wait_for_others(over: threading.Event) -> None:
    """As in a collective: the innermost line of Python waits for something."""
    handle = select.epoll()
    wait = handle.poll
    while not over.is_set():
        wait(0.01)


def watched(
    store: Store, rank: int, work, over: threading.Event, told: dict, size: int = 2
) -> None:
    """The life of a rank that beats, and then does not come back from `work`."""

    def end(message: str) -> None:
        told[rank] = message
        over.set()

    with Watch(store, rank, size, 0.4, end) as watch:
        for _ in range(5):  # longer than the timeout, but it goes on
            watch.beat("step 4: reading text")
            time.sleep(0.12)
        assert not told
        watch.beat(f"step 5: {work.__name__}")
        work(over)


def run(store: Store, works: dict, size: int = 2) -> dict[int, str]:
    told: dict[int, str] = {}
    overs = {rank: threading.Event() for rank in works}
    threads = [
        threading.Thread(target=watched, args=(store, rank, work, overs[rank], told, size))
        for rank, work in works.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_a_rank_that_hangs_outside_of_communication_is_named_by_all():
    told = run(Store(), {0: wait_for_others, 1: read_slowly})
    assert set(told) == {0, 1}
    for message in told.values():
        first, *lines = message.splitlines()
        assert first == (
            "error: no progress for 0.4 seconds (training.timeout_seconds): rank 1 hangs."
        )
        assert lines[0].startswith("  rank 0: step 5: wait_for_others, waiting for other ranks in ")
        assert lines[1].startswith("  rank 1: step 5: read_slowly, in ")
        assert "run again to resume from its last checkpoint" in lines[-1]


def test_a_rank_that_gives_no_sign_is_named():
    store = Store()
    store.set("runs/1", "10:20:30 UTC\nstep 5: computing")  # the last that was heard of it
    told = run(store, {0: wait_for_others, 2: wait_for_others}, size=3)
    assert "): rank 1 hangs.\n" in told[0]
    assert "  rank 1 has not responded since 10:20:30 UTC (step 5: computing)\n" in told[2]


def test_a_store_whose_keeper_is_stopped_holds_nobody_up():
    began = time.monotonic()
    told = run(StoreOfAStoppedProcess(), {1: wait_for_others}, size=3)
    assert "): rank 0 hangs.\n  rank 0, or the torchrun that started it" in told[1]
    assert "rank 2" not in told[1]  # nobody knows
    assert time.monotonic() - began < 20


def stop_a_rank(*, stopped: int) -> str:
    """Two ranks, one of which is stopped before a collective; what the other says."""
    rank, ids, told = dist.get_rank(), [0, 0], []
    dist.all_gather_object(ids, os.getpid())

    def end(message: str) -> None:
        told.append(message)
        os.kill(ids[stopped], signal.SIGCONT)  # the collective ends, and so does the test

    with shared_watch(1.5, end) as watch:
        watch.beat("step 1: computing")
        dist.barrier()
        time.sleep(0.5)  # to tell that it runs
        if rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
    return told[0] if told else ""


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_stopped_process_is_named_with_since_when(pool: WorkerPool, stopped):
    told = pool.run(stop_a_rank, 2, stopped=stopped)[1 - stopped]
    assert f"): rank {stopped} hangs.\n" in told
    assert re.search(
        rf"  rank {stopped} has not responded since \d\d:\d\d:\d\d UTC \(step 1: computing\)\n",
        told,
    )
    assert (
        f"  rank {1 - stopped}: step 1: computing, waiting for other ranks in stop_a_rank" in told
    )


def test_a_watch_that_is_over_says_nothing():
    told: list[str] = []
    with Watch(Store(), 0, 1, 0.1, told.append) as watch:
        watch.beat("step 1: computing")
    time.sleep(0.3)
    assert told == []
