"""The engine in a thread of its own, for callers on an event loop."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable

from mor_layers.generation import DepthBatchingEngine, Event, Request


class OverloadedError(Exception):
    """Too many requests wait already, or the server is going down."""


class EngineWorker:
    """Runs ticks as long as there is work.

    Args:
        engine: not to be touched by anyone else.
        max_waiting: requests that may wait for a place; more are turned away.
    """

    def __init__(self, engine: DepthBatchingEngine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[Event | None], None]] = {}
        self._is_closing = self._is_closed = False
        self._lock = threading.Lock()  # no command may come after the last one was obeyed
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still serve."""
        return not self._is_closing

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """Submit a request; its events as they come. Left early, the request is cancelled.

        Raises:
            ValueError: it can never be served.
            OverloadedError: not now.
        """
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[int] = loop.create_future()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def answer(number: int | Exception) -> None:
            if not accepted.done():
                if isinstance(number, int):
                    accepted.set_result(number)
                else:
                    accepted.set_exception(number)

        def submit() -> None:
            try:
                if self._is_closing:
                    raise OverloadedError("the server is going down")
                if self.engine.num_waiting >= self.max_waiting:
                    raise OverloadedError("too many requests are waiting")
                number: int | Exception = self.engine.submit(request)
                self._listeners[number] = tell
            except (ValueError, OverloadedError) as error:
                number = error
            loop.call_soon_threadsafe(answer, number)

        if not self._send(submit):
            raise OverloadedError("the server is going down")
        number = None
        try:
            number = await asyncio.shield(accepted)
            while True:
                event = await events.get()
                if event is None:
                    raise OverloadedError("the server is going down")
                yield event
                if event.finish_reason is not None:
                    number = None
                    return
        finally:
            if number is not None:
                self.cancel(number)
            elif not accepted.done():  # the caller left while the request was on its way
                accepted.add_done_callback(
                    lambda done: done.exception() is None and self.cancel(done.result())
                )

    def cancel(self, number: int) -> None:
        """Give a request up, if it has not ended."""
        self._send(lambda: self._cancel(number))

    def close(self) -> None:
        """Give up all requests and end the thread."""
        self._send(self._close)
        self._thread.join()

    def _send(self, command: Callable[[], None]) -> bool:
        """Have the thread do something; False where it has ended."""
        with self._lock:
            if not self._is_closed:
                self._commands.put(command)
            return not self._is_closed

    def _cancel(self, number: int) -> None:
        self._listeners.pop(number, None)
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
            self.failure = error
            raise
        finally:
            self._is_closing = True
            with self._lock:
                self._is_closed = True
                while not self._commands.empty():
                    self._commands.get()()
            for tell in self._listeners.values():
                tell(None)

    def _obey(self) -> None:
        """All commands that have come; waits for one where there is nothing else to do."""
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
            if tell is not None:
                tell(event)
