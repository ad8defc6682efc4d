"""Writing a state through Megatron's `torch_dist` format, so that every rank hears of an error."""

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
    """Write a sharded state into an empty folder. All ranks call it.

    Raises:
        OSError: on every rank, whichever rank met it.
    """
    problem: OSError | None = None
    with _results_in_process(), _errors_kept() as errors:
        try:
            dist_checkpointing.save(state, str(folder))
        except CheckpointException as error:  # raised by all ranks; the first one knows the causes
            causes = [f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items()]
            problem = OSError("; ".join(causes)) if causes else None
    raise_together(problem or next(iter(errors), None))


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Lets a synchronous save collect the results of its own thread in an ordinary queue.

    filesystem_async.py:65 would start a manager process for them, which runs the main script again
    where it has no guard, and cannot start from a daemon.
    """
    previous, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


@contextmanager
def _errors_kept() -> Iterator[list[OSError]]:
    """Keeps errors of writing, which Megatron would lose, or raise on one rank alone.

    A rank's own error is replaced by its class (filesystem_async.py:287), or raised while other
    ranks wait in a collective: of a second thread (:340), and of what the first rank writes alone
    (state_dict_saver.py:243, serialization.py:449). With it kept, all ranks come to an end, and the
    save is then given up by all.
    """
    errors: list[OSError] = []

    def write(
        transforms: Any, *, results_queue: Any, count_queue: Any, **arguments: Any
    ) -> tuple[int, list[Any]]:
        outcome: Any = written(transforms, results_queue=None, count_queue=None, **arguments)
        index, results = outcome  # None only where it is given a queue
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
    """The error of the file system behind an error; torch's writers have their own."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or OSError(str(error))
