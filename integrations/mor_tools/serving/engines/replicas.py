"""Several engines behind one port, each with a copy of the model."""

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from functools import reduce
from multiprocessing.connection import wait
from operator import add

import torch

from mor_layers.generation import Event, Request
from mor_tools.serving.engines.metrics import Statistics
from mor_tools.serving.engines.options import EngineOptions
from mor_tools.serving.engines.replica import RemoteEngine
from mor_tools.serving.engines.worker import EngineWorker, UnavailableError

PREFIX_TOKENS = 32
"""Requests whose first tokens agree this far are sent to the same replica, which has their keys."""
MOST_MORE = 4
"""Unless it has so many more open requests than the least busy one."""
STOP_SECONDS = 5
"""Seconds that the processes have to end, after their engines were closed, before they are killed."""
MOST_PREFIXES = 4096
"""Number of beginnings whose replica is remembered."""


class Replicas:
    """Sends each request to one of several engines.

    A request goes to the replica that has the beginning of its prompt in its cache, as long as that one
    is about as busy as the others, and else to the least busy one. If a process is lost, the requests
    of its replica end with an error, and `on_failure` is called so that the server can end and be
    restarted.

    Args:
        options: the model, and the engine of each replica.
        count: number of replicas.
        num_ranks: processes of each, over which its model is sharded.
        max_waiting: largest number of waiting requests, of all replicas together.

    Raises:
        ValueError: the options do not fit the model or the machine.
    """

    def __init__(
        self, options: EngineOptions, count: int, num_ranks: int, max_waiting: int
    ) -> None:
        _require_devices(options, count * num_ranks)
        threads = max(1, torch.get_num_threads() // (count * num_ranks))
        self._engines = [
            RemoteEngine(options, num_ranks, threads, first_device=i * num_ranks)
            for i in range(count)
        ]
        try:
            for engine in self._engines:  # they load at the same time
                engine.wait_until_ready()
        except BaseException:
            self._end()
            raise
        self.workers = [EngineWorker(engine, -(-max_waiting // count)) for engine in self._engines]
        self._open = [0] * count
        self._remembers = options.cache.prefix_sharing != "off"
        self._replica_of: OrderedDict[Hashable, int] = OrderedDict()
        self._is_closing = False
        threading.Thread(target=self._watch, name="watch replicas", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return all(worker.is_alive for worker in self.workers)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return any(worker.has_work for worker in self.workers)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a prompt and its continuation."""
        return self.workers[0].max_length

    @property
    def statistics(self) -> Statistics:
        """What all engines together have counted."""
        return reduce(add, (worker.statistics for worker in self.workers))

    @property
    def unavailable(self) -> UnavailableError:
        """The error that says why no requests are accepted."""
        return next((w for w in self.workers if w.failure), self.workers[0]).unavailable

    @property
    def failure(self) -> BaseException | None:
        """Why an engine has failed."""
        return next((worker.failure for worker in self.workers if worker.failure), None)

    @property
    def on_failure(self) -> Callable[[], None] | None:
        """Called if an engine fails."""
        return self.workers[0].on_failure

    @on_failure.setter
    def on_failure(self, call: Callable[[], None] | None) -> None:
        for worker in self.workers:
            worker.on_failure = call

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """Submit a request to a replica and yield its events, as `EngineWorker.events` does."""
        chosen = self._choose(request)
        self._open[chosen] += 1
        events = self.workers[chosen].events(request)
        try:
            async for event in events:
                yield event
        finally:
            self._open[chosen] -= 1
            await events.aclose()  # type: ignore[attr-defined]

    def drain(self) -> None:
        """Accept no more requests. Open requests continue."""
        for worker in self.workers:
            worker.drain()

    def close(self) -> None:
        """Cancel all requests and end the processes."""
        self._is_closing = True
        for worker in self.workers:
            worker.close()
        self._end()

    def _end(self) -> None:
        for engine in self._engines:
            engine.close()
        deadline = time.monotonic() + STOP_SECONDS
        for engine in self._engines:
            engine.join(deadline)

    def _choose(self, request: Request) -> int:
        least = self._open.index(min(self._open))
        if not self._remembers:
            return least
        beginning = (request.client, request.cache_salt, request.ids[:PREFIX_TOKENS])
        chosen = self._replica_of.pop(beginning, least)
        if self._open[chosen] - self._open[least] > MOST_MORE:
            chosen = least
        self._replica_of[beginning] = chosen  # the newest is last
        if len(self._replica_of) > MOST_PREFIXES:
            self._replica_of.popitem(last=False)
        return chosen

    def _watch(self) -> None:
        """Notice lost processes, also of replicas that nobody calls."""
        owners = {
            process.sentinel: (worker, engine)
            for worker, engine in zip(self.workers, self._engines, strict=True)
            for process in engine.processes
        }
        worker, engine = owners[wait(list(owners))[0]]  # type: ignore[index]
        if not self._is_closing:
            engine.lose()
            worker.look_at_engine()


def _require_devices(options: EngineOptions, wanted: int) -> None:
    """Refuse more processes than there are accelerators.

    Raises:
        ValueError: there are too few, or one of them is named.
    """
    if options.device == "cpu":
        return
    if ":" in options.device:
        raise ValueError(
            f"--device {options.device} names one device, but each of {wanted} processes takes its own. "
            f"Use --device {options.device.partition(':')[0]}."
        )
    available = torch.get_device_module(options.device).device_count()
    if wanted > available:
        raise ValueError(
            f"{wanted} processes (replicas times ranks) need as many devices, but {available} are "
            "available. Use fewer --replicas or a smaller --tensor-parallel."
        )
