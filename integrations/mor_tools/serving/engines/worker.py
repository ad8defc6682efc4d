"""Runs the engine in a thread of its own, for callers in an event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

from mor_layers.generation import DepthBatchingEngine, Event, Request
from mor_tools.serving.engines.metrics import Statistics
from mor_tools.serving.engines.replica import LostReplicaError, RemoteEngine

logger = logging.getLogger(__name__)


class OverloadedError(Exception):
    """Too many requests are waiting."""


class UnavailableError(Exception):
    """The server is shutting down, or its engine has failed."""


class EngineWorker:
    """A thread that runs ticks of the engine while there are requests.

    An error of one request ends only that request. If the engine itself fails, it is not used again:
    all requests end, and `on_failure` is called in the engine's thread.

    Args:
        engine: the engine. No other code may use it.
        max_waiting: largest number of waiting requests. Further ones are rejected.
    """

    def __init__(self, engine: DepthBatchingEngine | RemoteEngine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[Event | None], bool]] = {}
        self._is_draining = self._is_closing = self._is_closed = False
        self._lock = threading.Lock()  # prevents commands from being queued after the thread's end
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine accepts requests."""
        return not (self._is_draining or self._is_closing)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._listeners)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a prompt and its continuation."""
        return self.engine.max_length

    @property
    def statistics(self) -> Statistics:
        """What the engine has counted."""
        if isinstance(self.engine, RemoteEngine):
            return self.engine.statistics
        return Statistics.of(self.engine)

    @property
    def unavailable(self) -> UnavailableError:
        """The error that says why no requests are accepted."""
        if self.failure is not None:
            return UnavailableError("the engine has failed, and the server must be restarted")
        return UnavailableError("the server is shutting down")

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """Submit a request and yield its events. Closing the iterator early cancels the request.

        Raises:
            ValueError: the request can never be served.
            OverloadedError: too many requests are waiting.
            UnavailableError: the server is shutting down, or its engine has failed.
        """
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[int] = loop.create_future()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> bool:
            return _post(loop, events.put_nowait, event)

        def answer(number: int | Exception) -> None:
            if not accepted.done():
                if isinstance(number, int):
                    accepted.set_result(number)
                else:
                    accepted.set_exception(number)

        def submit() -> None:
            try:
                if not self.is_alive:
                    raise self.unavailable
                if self.engine.num_waiting >= self.max_waiting:
                    raise OverloadedError("too many requests are waiting")
                number: int | Exception = self.engine.submit(request)
                self._listeners[number] = tell
            except LostReplicaError:  # the next step of the engine raises it again
                number = UnavailableError("the engine has failed, and the server must be restarted")
            except Exception as error:  # the engine validates a request before it queues it
                number = error
            _post(loop, answer, number)

        if not self._send(submit):
            raise self.unavailable
        number = None
        try:
            number = await asyncio.shield(accepted)
            while True:
                event = await events.get()
                if event is None:
                    raise self.unavailable
                yield event
                if event.finish_reason is not None:
                    number = None
                    return
        finally:
            if number is not None:
                self.cancel(number)
            elif not accepted.done():  # the caller stopped before the engine got the request
                accepted.add_done_callback(
                    lambda done: done.exception() is None and self.cancel(done.result())
                )

    def cancel(self, number: int) -> None:
        """Cancel a request if it has not ended."""
        self._send(lambda: self._cancel(number))

    def look_at_engine(self) -> None:
        """Let the thread notice that the engine is lost, also if there are no requests."""
        self._send(lambda: None)

    def drain(self) -> None:
        """Accept no more requests. Open requests continue."""
        self._is_draining = True

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        self._send(self._close)
        self._thread.join()

    def _send(self, command: Callable[[], None]) -> bool:
        """Queue a command for the thread. Returns False if the thread has ended."""
        with self._lock:
            if not self._is_closed:
                self._commands.put(command)
            return not self._is_closed

    def _cancel(self, number: int) -> None:
        self._listeners.pop(number, None)
        if self.failure is None:
            self.engine.cancel(number)

    def _close(self) -> None:
        self._is_closing = True
        for number, tell in list(self._listeners.items()):
            tell(None)
            self._cancel(number)

    def _work(self) -> None:
        try:
            while not (self._is_closing and self.engine.is_idle):
                self._obey()
                if not self.engine.is_idle:
                    self._dispatch(self.engine.step())
        except BaseException as error:
            logger.exception("the engine has failed")
            self.failure = error
        finally:
            self._is_closing = True
            with self._lock:
                self._is_closed = True
                while not self._commands.empty():
                    self._commands.get()()
            for tell in self._listeners.values():
                tell(None)
            self._listeners.clear()
            if self.failure is not None and self.on_failure is not None:
                self.on_failure()

    def _obey(self) -> None:
        """Run all queued commands. If the engine is idle, wait for a command first."""
        while True:
            try:
                command = self._commands.get(block=self.engine.is_idle and not self._is_closing)
            except queue.Empty:
                return
            command()

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            tell = self._listeners.get(event.number)
            if event.finish_reason is not None:
                self._listeners.pop(event.number, None)
            if tell is not None and not tell(event) and event.finish_reason is None:
                self._cancel(event.number)  # the listener's event loop is closed


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *values: object) -> bool:
    """Let an event loop call a function. Returns False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *values)
    except RuntimeError:
        return False
    return True
