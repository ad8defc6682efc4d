"""The worker pool tells failures, hangs and deaths apart, and survives them."""

import gc
import importlib
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import pool
from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="module")
def small_pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(max_workers=2, timeout=60.0)
    yield workers
    workers.close()


def sum_of_ranks(offset: int) -> tuple[int, Tensor]:
    total = torch.tensor(torch.distributed.get_rank() + offset)
    torch.distributed.all_reduce(total)
    return os.getpid(), total


def fail_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise ValueError("a deliberate failure")
    torch.distributed.barrier()


def sleep_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        time.sleep(60)


def die_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os._exit(3)
    torch.distributed.barrier()


def train_and_count_threads() -> int:
    from tests.distributed import megatron_setup as setup

    setup.initialize()
    config = setup.tiny_config(num_moe_experts=2, moe_ffn_hidden_size=16)
    setup.forward_backward(setup.data_parallel(setup.tiny_gpt(config)), setup.random_tokens(1, 4))
    return len(os.listdir("/proc/self/task"))


LEFT: list[weakref.ref] = []


def leave_a_model(imports: str) -> int:
    """Leaves a model that only the garbage collector can free; how many of earlier ones live."""
    importlib.import_module(imports)
    model = nn.Linear(2, 2)
    model.itself = [model]
    alive = sum(left() is not None for left in LEFT)
    LEFT.append(weakref.ref(model))
    return alive


def count_what_is_walked() -> int:
    return len(gc.get_objects())


LARGER_SIZES: list[int] = []


@dataclass(frozen=True)
class LargerMeeting(pool._Meeting):
    """A meeting that waits in vain for one more rank, as often as LARGER_SIZES has an entry."""

    def __post_init__(self) -> None:
        if LARGER_SIZES:
            object.__setattr__(self, "world_size", LARGER_SIZES.pop())


def test_results_come_back_by_rank_from_the_same_processes(small_pool: WorkerPool) -> None:
    first = small_pool.run(sum_of_ranks, 2, offset=1)
    second = small_pool.run(sum_of_ranks, 2, offset=2)
    assert [total.item() for _, total in first + second] == [3, 3, 5, 5]
    assert [process for process, _ in first] == [process for process, _ in second]


def test_no_run_leaves_its_process_groups_behind(small_pool: WorkerPool) -> None:
    threads = [small_pool.run(train_and_count_threads, 1)[0] for _ in range(4)]
    assert threads[3] <= threads[1]


def test_models_are_freed_and_imports_are_not_walked(small_pool: WorkerPool) -> None:
    # Imports between the runs, and within one, must not make a model outlive its run.
    alive = [
        small_pool.run(leave_a_model, 1, imports=name)[0] for name in ("wave", "colorsys", "wave")
    ]
    assert alive == [0, 0, 0]
    assert small_pool.run(count_what_is_walked, 1)[0] < 50_000


def test_a_failing_rank_is_shown_first_with_its_traceback(small_pool: WorkerPool) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1.*--- rank 1\n.*a deliberate failure"):
        small_pool.run(fail_on_rank, 2, rank=1)
    assert small_pool.run(sum_of_ranks, 2, offset=0)[0][1] == 1


def test_a_hang_ends_with_the_stack_of_the_rank_that_hangs(small_pool: WorkerPool) -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\].*sleep_on_rank"):
        small_pool.run(sleep_on_rank, 2, timeout=2.0, rank=1)
    assert small_pool.run(sum_of_ranks, 2, offset=0)[0][1] == 1


def test_ranks_that_do_not_meet_try_again(
    small_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_Meeting", LargerMeeting)
    monkeypatch.setattr(pool, "_MEETING_TIMEOUT", 1.5)
    LARGER_SIZES[:] = [3]
    with pytest.warns(UserWarning, match=r"trying again: the meeting of the ranks of sum_of_ranks"):
        assert small_pool.run(sum_of_ranks, 2, offset=0)[0][1] == 1
    LARGER_SIZES[:] = [3]
    monkeypatch.setattr(pool, "_MEETINGS", 1)
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[(0, 1|1, 0)\].*init_process_group"):
        small_pool.run(sum_of_ranks, 2, offset=0)


def test_a_dead_rank_is_an_error(small_pool: WorkerPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1\nended with exit code 3"):
        small_pool.run(die_on_rank, 2, rank=1)
    assert small_pool.run(sum_of_ranks, 2, offset=0)[0][1] == 1


def test_an_impossible_world_size_is_refused(small_pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="world_size=3 is not between 1 and max_workers=2"):
        small_pool.run(sum_of_ranks, 3, offset=0)
