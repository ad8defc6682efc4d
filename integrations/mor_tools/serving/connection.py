"""A connection to the server: closed if no request comes, and at once if there are too many."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection whose requests must begin in time.

    uvicorn waits for a request for as long as the caller likes, so that connections which send nothing,
    or the head of a request byte by byte, would use up the files that a process may open.

    Args:
        head_timeout: seconds within which the head of a request must arrive, from the beginning of the
            connection, or from the first byte of a later request.
        max_connections: largest number of connections. Further ones are closed at once.
        given: those of `H11Protocol`.
    """

    def __init__(
        self, *given: Any, head_timeout: float, max_connections: int, **options: Any
    ) -> None:
        super().__init__(*given, **options)
        self.head_timeout, self.max_connections = head_timeout, max_connections
        self._closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # the head is not complete
            self._await_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._closing is None:
            self._closing = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
