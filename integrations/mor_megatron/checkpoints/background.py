"""Checkpoints that are written while training goes on.

`BackgroundSaves` writes the same folders as `runs.save`, by Megatron's asynchronous saves: tensors are
copied to the memory of the host, a forked process of each rank writes them, and the folder gets its name
once all ranks have written their parts. Until then, `runs.load` does not see it.

    saves = BackgroundSaves()
    for step in ...:
        ...
        saves.finish()  # costs an all-reduce of one number while a save is under way
        if step % 1000 == 0:
            saves.begin(folder, step, chunks, optimizer)
    saves.finish(waits=True)
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mor_megatron.checkpoints import runs
from mor_megatron.checkpoints.integrity import raise_together
from mor_megatron.checkpoints.writer import errors_kept

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class BackgroundSaves:
    """Saves of a training run, at most one of which is under way. All ranks must make the same calls."""

    def __init__(self) -> None:
        # Forked anew for each save, so that a CPU's tensors, which are not copied, cannot change under
        # the hands of the process that writes them.
        self._calls = AsyncCallsQueue(persistent=False)
        self._under_way: runs.Unfinished | None = None

    def begin(
        self,
        directory: str | Path,
        step: int,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Begin to save a checkpoint, after waiting for the one before. The arguments are those of
        `runs.save`.

        Returns:
            The directory that the checkpoint will have.

        Raises:
            OSError: the save before failed, or the folder cannot be written. Raised on every rank.
        """
        self.finish(waits=True)
        state = runs.state_to_save(step, chunks, optimizer, scheduler, extra)
        unfinished = runs.Unfinished(directory, step)
        with _results_from_forks():
            request = dist_checkpointing.save(
                state, str(unfinished.partial), async_sharded_save=True, async_strategy="mcore"
            )
        if request.async_fn is not None:  # a rank may have nothing to write
            request = request._replace(async_fn=_ending_with_this_process(request.async_fn))
        self._calls.schedule_async_request(request)
        self._under_way = unfinished
        return unfinished.target

    def finish(self, waits: bool = False) -> Path | None:
        """Give the checkpoint that is under way its name, if all ranks have written it.

        Args:
            waits: wait until they have. Do so before the program ends.

        Returns:
            The checkpoint that is complete now; None if there is none, or it is still being written.

        Raises:
            OSError: it could not be written. Raised on every rank. What was written is removed, and
                earlier checkpoints are unchanged.
        """
        unfinished, problem = self._under_way, None
        if unfinished is None:
            return None
        with errors_kept() as errors:
            try:
                if not self._calls.maybe_finalize_async_calls(blocking=waits):
                    return None
            except CheckpointException as error:  # on all ranks, but only the first has the causes
                causes = [f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items()]
                problem = OSError("; ".join(causes)) if causes else None
        self._under_way = None
        with unfinished.removed_on_error():
            raise_together(problem or next(iter(errors), None))
            unfinished.publish()
        return unfinished.target


@contextmanager
def _results_from_forks() -> Iterator[None]:
    """Let a save collect the results of its process through a manager that is forked.

    filesystem_async.py:65 would spawn it. That process would run the main script again if it has no
    `__main__` guard.
    """
    previous = filesystem_async._results_queue
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


def _ending_with_this_process(write: Callable[..., None]) -> Callable[..., None]:
    """`write`, for a forked process that ends when this one is killed.

    It would otherwise go on writing while the next session, which may begin at once, removes the
    folder and writes another checkpoint of the same step into a folder of the same name.
    """
    parent = os.getpid()

    def run(*arguments: Any, **options: Any) -> None:
        _end_with(parent)
        write(*arguments, **options)

    return run


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which forked it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
