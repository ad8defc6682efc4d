"""Long-lived worker processes that run a test function on several ranks.

Importing Megatron takes seconds, so a worker imports it once and then serves every distributed
test of a pytest run. On CPUs even that once is shared: a fork server imports it, and the workers
are its forks.
"""

import faulthandler
import gc
import importlib
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Seconds that the other ranks have to answer once one rank failed, and to give in after a hang.
_GRACE = 5.0

# Seconds that imports may take, which are no part of a run's time: a slow machine does not hang.
_IMPORT_TIMEOUT = 600.0

# gloo was seen to hang in connecting its ranks, once in some ten thousand meetings. No code of a
# run has begun by then, so ranks that have not met within these seconds try again as new processes.
_MEETING_TIMEOUT = 40.0
_MEETINGS = 3

# What the fork server imports for its forks.
_PRELOADED = "tests.distributed.preloaded"


@dataclass(frozen=True)
class _Imports:
    """What every rank imports before a run."""

    search_path: list[str]
    module: str
    timeout: float


@dataclass(frozen=True)
class _Meeting:
    """What every rank needs to know to form the process group of a run."""

    rendezvous: str
    world_size: int
    run_timeout: float
    on_gpus: bool
    timeout: float


@dataclass(frozen=True)
class _Run:
    """What every rank of one run is told."""

    call: bytes  # pickled (function, keyword arguments); by reference, so imports come first
    timeout: float


_Request = _Imports | _Meeting | _Run


@dataclass(frozen=True)
class _Answer:
    """What a rank made of a request."""

    value: Any
    """What the function returned, or the text of what went wrong."""
    failed_at: float | None = None
    """When it failed, on the clock that all processes share; None where it did not."""


class WorkerPool:
    """Runs functions on ranks, in processes that outlive the run.

    Args:
        max_workers: largest world size; workers start when a run first needs them.
        timeout: seconds a run may take, once its ranks have imported what it needs, before it
            counts as hung.
        on_gpus: one GPU a rank, over NCCL; else CPUs, over gloo.
        search_first: folders in which the workers look for packages before `sys.path`.
    """

    def __init__(
        self,
        max_workers: int = 4,
        timeout: float = 300.0,
        on_gpus: bool = False,
        search_first: Sequence[Path] = (),
    ) -> None:
        self.search_first = [str(folder) for folder in search_first]
        self.max_workers = max_workers
        self.timeout = timeout
        self.on_gpus = on_gpus
        # A fork cannot use CUDA once its parent asked for it, which imports do, and cannot take
        # back an import for a package that `search_first` puts in front.
        is_forked = not on_gpus and not search_first
        self._context = multiprocessing.get_context("forkserver" if is_forked else "spawn")
        if is_forked:
            self._context.set_forkserver_preload([_PRELOADED])
        self._workers: list[tuple[Any, Connection]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self._meetings = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int = 1,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls `function(**kwargs)` on `world_size` ranks with `torch.distributed` initialised.

        Args:
            function: defined at the top level of an importable module (it travels by name).
            world_size: number of ranks, at most `max_workers`.
            timeout: seconds, instead of the pool's.
            **kwargs: the same for every rank, picklable.

        Returns:
            What the function returned, by rank; tensors must be on the CPU.

        Raises:
            AssertionError: a rank failed or died. The message holds what every failing rank says,
                the first of them first.
            TimeoutError: a rank hung. The message holds its stack.
        """
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(
                f"world_size={world_size} is not between 1 and max_workers={self.max_workers}"
            )
        timeout = timeout or self.timeout
        name = function.__name__
        call = pickle.dumps((function, kwargs))
        imports = _Imports([*self.search_first, *sys.path], function.__module__, _IMPORT_TIMEOUT)
        for remaining in reversed(range(_MEETINGS)):
            self._start(world_size)
            self._ask(f"importing what {name} needs", world_size, imports)
            try:
                self._meet(name, world_size, timeout)
                break
            except TimeoutError as hang:
                if not remaining:
                    raise
                warnings.warn(f"trying again: {hang}", stacklevel=2)
        return self._ask(name, world_size, _Run(call, timeout))

    def close(self) -> None:
        """Ends the workers. A later run starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()

    def _meet(self, name: str, world_size: int, run_timeout: float) -> None:
        self._meetings += 1
        rendezvous = os.path.join(self._directory.name, f"rendezvous_{self._meetings}")
        meeting = _Meeting(rendezvous, world_size, run_timeout, self.on_gpus, _MEETING_TIMEOUT)
        self._ask(f"the meeting of the ranks of {name}", world_size, meeting)

    def _start(self, count: int) -> None:
        for rank in range(len(self._workers), count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, self._stack_file(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _ask(self, name: str, world_size: int, request: _Request) -> list[Any]:
        # A worker's own clock starts later, so what it ends by a hang is not taken for a failure.
        hung_at = time.monotonic() + request.timeout
        for rank in range(world_size):
            with suppress(BrokenPipeError):  # a worker that died says so when it is listened to
                self._workers[rank][1].send((rank, request))
        return self._collect(name, world_size, hung_at)

    def _collect(self, name: str, world_size: int, hung_at: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, _Answer] = {}
        pending = {self._workers[rank][1]: rank for rank in range(world_size)}
        error = AssertionError
        # A hanging worker writes its stack and ends by itself, so it is given time to.
        deadline = hung_at + _GRACE
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    # No time is known, but what others may say will be for want of this one.
                    answer = _Answer(self._obituary(rank), -math.inf)
                if answer.failed_at is None:
                    results[rank] = answer.value
                    continue
                if not failures:
                    error = TimeoutError if time.monotonic() >= hung_at else AssertionError
                    deadline = min(deadline, time.monotonic() + _GRACE)
                failures[rank] = answer
        failures |= {rank: _Answer("gave no answer", math.inf) for rank in pending.values()}
        if pending or any(not process.is_alive() for process, _ in self._workers):
            self.close()
        if failures:
            # Which answer comes first is chance: a rank that fails takes the others with it.
            ranks = sorted(failures, key=lambda rank: failures[rank].failed_at or 0.0)
            details = "\n".join(f"--- rank {rank}\n{failures[rank].value}" for rank in ranks)
            raise error(f"{name} failed on ranks {ranks} of {world_size}\n{details}")
        return [results[rank] for rank in range(world_size)]

    def _obituary(self, rank: int) -> str:
        process, _ = self._workers[rank]
        process.join()
        return f"ended with exit code {process.exitcode}\n{self._stack_file(rank).read_text()}"

    def _stack_file(self, rank: int) -> Path:
        return Path(self._directory.name, f"stack_{rank}.txt")


def _serve(connection: Connection, stack_file: Path) -> None:
    """A worker's life: one run after another until the parent closes the pipe."""
    import torch

    torch.set_num_threads(1)
    num_modules = 0
    with stack_file.open("w") as stacks, suppress(EOFError, KeyboardInterrupt):
        faulthandler.enable(stacks)
        while True:
            rank, request = connection.recv()
            faulthandler.dump_traceback_later(request.timeout, exit=True, file=stacks)
            answer = _answer(rank, request)
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(answer)
            # Between two runs no model lives. What imports have made stays until the end, so
            # that the collections after every run need not walk its half a million objects.
            if len(sys.modules) > num_modules:
                gc.collect()
                gc.freeze()
                num_modules = len(sys.modules)


def _answer(rank: int, request: _Request) -> bytes:
    try:
        if isinstance(request, _Run):
            return pickle.dumps(_run(request))
        if isinstance(request, _Meeting):
            _join(rank, request)
        else:
            _import(request)
        return pickle.dumps(_Answer(None))
    except Exception:
        return pickle.dumps(_Answer(traceback.format_exc(), time.monotonic()))


def _import(imports: _Imports) -> None:
    sys.path[:] = imports.search_path
    importlib.import_module(imports.module)


def _join(rank: int, meeting: _Meeting) -> None:
    import torch

    if meeting.on_gpus:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if meeting.on_gpus else "gloo",
        init_method=f"file://{meeting.rendezvous}",
        rank=rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=meeting.run_timeout),
    )


def _run(run: _Run) -> _Answer:
    import torch

    function, kwargs = pickle.loads(run.call)
    torch.manual_seed(0)
    try:
        answer = _Answer(function(**kwargs))
    except Exception:
        answer = _Answer(traceback.format_exc(), time.monotonic())
    _forget_run()
    return answer


def _forget_run() -> None:
    """Resets what Megatron and the plug keep in globals, and leaves the process group."""
    import torch

    if "megatron.core" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state
        from megatron.core.tensor_parallel import random

        parallel_state.destroy_model_parallel()
        random.initialize_rng_tracker(force_reset=True)
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        forget_losses()
    _free_models()
    torch.distributed.destroy_process_group()


def forget_losses() -> None:
    """Resets the scales and the logs that losses of earlier models left in globals."""
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossAutoScaler,
        MTPLossLoggingHelper,
    )

    MTPLossLoggingHelper.tracker.clear()
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    if "mor_megatron.layers.routing.auxiliary_loss" in sys.modules:
        from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler

        RouterLossScaler.scale = None


def _free_models() -> None:
    """Lets go of models, and with them of process groups: each polls from a thread of its own."""
    if "megatron.core.models.gpt" in sys.modules:
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        RotaryEmbedding.forward.cache_clear()  # of a method: it keeps the module
        # Hooks on the autograd graph keep a DDP where the garbage collector cannot see them.
        for wrapped in [o for o in gc.get_objects() if type(o) is DistributedDataParallel]:
            vars(wrapped).clear()
    gc.collect()
