"""Writes checkpoints in Megatron's `torch_dist` format, with errors raised on every rank."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from mor_megatron.checkpoints.integrity import raise_together


def write_state(state: ShardedStateDict, folder: Path) -> None:
    """Write a sharded state into an empty folder. All ranks must call it.

    Raises:
        OSError: any rank had an error. Raised on every rank.
    """
    problem: OSError | None = None
    with _results_in_process(), errors_kept() as errors:
        try:
            dist_checkpointing.save(state, str(folder))
        except (
            CheckpointException
        ) as error:  # all ranks raise it, but only the first has the causes
            causes = [f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items()]
            problem = OSError("; ".join(causes)) if causes else None
    raise_together(problem or next(iter(errors), None))


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Let a synchronous save collect the results of its thread in an ordinary queue.

    filesystem_async.py:65 would start a manager process for them. That process would run the main
    script again if it has no `__main__` guard, and cannot be started by a daemon process.
    """
    previous, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


@contextmanager
def errors_kept() -> Iterator[list[OSError]]:
    """Collect errors of writing that Megatron would lose or raise on one rank only.

    Megatron replaces the error of a rank by its class (filesystem_async.py:287). It raises errors of
    a second thread (:340) and of files that only the first rank writes (state_dict_saver.py:243,
    serialization.py:449) while the other ranks wait in a collective, which would hang. If these errors
    are collected instead, all ranks finish, and then they all raise.
    """
    errors: list[OSError] = []

    def write(
        transforms: Any, *, results_queue: Any, count_queue: Any, **arguments: Any
    ) -> tuple[int, list[Any]]:
        outcome: Any = written(transforms, results_queue=None, count_queue=None, **arguments)
        index, results = outcome  # it is only None if a queue was passed
        if isinstance(results, Exception):
            errors.append(_cause(results))
            results = []
        if results_queue is not None:
            results_queue.put((index, results))
        if count_queue is not None:
            count_queue.get()
            count_queue.task_done()
        return index, results

    def keeping(action: Callable[..., Any]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            try:
                action(*arguments)
            except Exception as error:
                errors.append(_cause(error))

        return run

    writer = filesystem_async.FileSystemWriterAsync
    written, finish, save_config = (
        writer.write_preloaded_data,
        writer.finish,
        serialization.save_config,
    )
    writer.write_preloaded_data = staticmethod(write)
    writer.finish, serialization.save_config = keeping(finish), keeping(save_config)
    try:
        yield errors
    finally:
        writer.write_preloaded_data = staticmethod(written)
        writer.finish, serialization.save_config = finish, save_config


def _cause(error: BaseException) -> OSError:
    """The file system's error that caused an error. torch's writers raise their own exceptions."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or OSError(str(error))
