"""A replica: an engine in processes of its own, called from the process that listens.

The first rank of a replica takes the calls from a pipe and answers each with its result and the engine's
statistics. Further ranks, among which the model is sharded, repeat its calls.
"""

import multiprocessing
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mor_layers.generation import Event, Request
from mor_layers.generation.ranks.lockstep import LockstepEngine
from mor_tools.serving.calls.grammars import GrammarConstraint
from mor_tools.serving.engines.metrics import Statistics
from mor_tools.serving.engines.options import EngineOptions

_FOREVER = timedelta(days=365)  # ranks wait for the next call of the first as long as there is none


class LostReplicaError(Exception):
    """A process of the replica has ended."""


@dataclass(frozen=True)
class _Rank:
    number: int
    size: int
    threads: int
    rendezvous: str


@dataclass(frozen=True)
class _Answer:
    value: Any
    """What the call returned, or a ValueError."""
    statistics: Statistics


class RemoteEngine:
    """The engine of a replica, with the calls of a `DepthBatchingEngine` that a server needs.

    Args:
        options: the model and the engine; the device of each rank is that of `options`, with the
            number `first_device` and following if it is an accelerator.
        num_ranks: processes over which the model is sharded.
        threads: CPU threads of each.
        first_device: number of the first rank's accelerator.
    """

    def __init__(
        self, options: EngineOptions, num_ranks: int = 1, threads: int = 1, first_device: int = 0
    ) -> None:
        self.max_length = options.cache.max_length
        self.is_lost = False
        self.statistics = Statistics()
        self._open: set[int] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="mor_replica_")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.processes: list[BaseProcess] = []
        for number in range(num_ranks):
            rank = _Rank(number, num_ranks, threads, str(Path(self._folder.name, "rendezvous")))
            device = options.device
            if device != "cpu":
                device = f"{device}:{first_device + number}"
            process = context.Process(
                target=_run_rank,
                args=(replace(options, device=device), rank, theirs if number == 0 else None),
                daemon=True,
            )
            process.start()
            self.processes.append(process)
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the weights to be loaded.

        Raises:
            ValueError: the engine cannot be built with these options, or a process has failed.
        """
        try:
            self._receive()
        except LostReplicaError as error:
            raise ValueError(
                f"{error} while it loaded the model. Its own message says why."
            ) from error

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do. A lost engine is not idle: its next step raises."""
        return not self._open and not self.is_lost

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a place in the batch."""
        return self.statistics.requests_waiting

    def submit(self, request: Request) -> int:
        """Queue a request and return its number, as `DepthBatchingEngine.submit` does.

        Raises:
            ValueError: the request can never be served.
            LostReplicaError: the replica is lost.
        """
        form = None
        if isinstance(request.constraint, GrammarConstraint):  # its state cannot be sent
            form, request = request.constraint.form, replace(request, constraint=None)
        number = self._call("submit", (request, form))
        self._open.add(number)
        return number

    def cancel(self, number: int) -> bool:
        """Cancel a request; its last event is returned by the next step."""
        return not self.is_lost and self._call("cancel", number)

    def step(self) -> list[Event]:
        """Run a tick and return its events.

        Raises:
            LostReplicaError: the replica is lost.
        """
        events = self._call("step")
        self._open.difference_update(e.number for e in events if e.finish_reason is not None)
        return events

    def lose(self) -> None:
        """Give the replica up, because one of its processes has ended."""
        self.is_lost = True
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Tell the processes to end."""
        with suppress(OSError):  # it has ended already
            self._connection.send(("close", None))

    def join(self, deadline: float) -> None:
        """Wait for the end of the processes.

        Args:
            deadline: when those that are left are killed, on `time.monotonic`'s clock.
        """
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._connection.close()
        self._folder.cleanup()

    def _call(self, name: str, value: Any = None) -> Any:
        if not self.is_lost:
            try:
                self._connection.send((name, value))
            except OSError:
                self.is_lost = True
        return self._receive()

    def _receive(self) -> Any:
        answer = None
        if not self.is_lost:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                self.is_lost = True
        if answer is None:
            raise LostReplicaError("a process of the engine has ended")
        self.statistics = answer.statistics
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value


def _run_rank(options: EngineOptions, rank: _Rank, connection: Connection | None) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the listening process ends this one in time
    if options.device == "cpu":
        torch.set_num_threads(rank.threads)
    else:
        torch.get_device_module(options.device).set_device(options.device)
    served = options.load()
    try:
        engine = options.engine(served, _group(options, rank))
    except ValueError as error:
        if connection is not None:
            connection.send(_Answer(error, Statistics()))
        return
    if connection is None:
        assert isinstance(engine, LockstepEngine)
        engine.follow()
        return
    connection.send(_Answer(None, Statistics.of(engine)))
    while True:
        try:
            name, value = connection.recv()
        except EOFError:  # the listening process has ended
            name, value = "close", None
        if name == "close":
            if isinstance(engine, LockstepEngine):
                engine.close()
            return
        connection.send(_Answer(_result(engine, served, name, value), Statistics.of(engine)))


def _result(engine: Any, served: Any, name: str, value: Any) -> Any:
    if name == "step":
        return engine.step()
    if name == "cancel":
        return engine.cancel(value)
    request, form = value
    try:
        if form is not None:
            request = replace(request, constraint=served.grammars.constraint(form))
        return engine.submit(request)
    except ValueError as error:  # of this request alone
        return ValueError(str(error))


def _group(options: EngineOptions, rank: _Rank) -> Any:
    if rank.size == 1:
        return None
    torch.distributed.init_process_group(
        "gloo" if options.device == "cpu" else None,
        init_method=f"file://{rank.rendezvous}",
        rank=rank.number,
        world_size=rank.size,
        timeout=_FOREVER,
    )
    return torch.distributed.group.WORLD
