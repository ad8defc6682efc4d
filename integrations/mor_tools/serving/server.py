"""The HTTP server process and its graceful shutdown."""

from functools import partial

import uvicorn

from mor_tools.serving.app import Service
from mor_tools.serving.connection import Connection

FLUSH_SECONDS = 3
"""Seconds to send responses that are still buffered when all calls have ended."""

KEEP_ALIVE_SECONDS = 75
"""Seconds that an idle connection stays open. Clients and proxies close theirs sooner, so that none
sends a request at the moment at which the server closes the connection."""


class Server(uvicorn.Server):
    """A server that stops gracefully.

    After a signal to stop, it keeps listening until its calls have ended, so that new calls get an
    error that says why they are refused. A second signal stops it at once. A failure of the engine
    stops it too, because it cannot serve any more and its supervisor must be able to restart it.

    Args:
        grace: seconds that running calls have to end after the signal to stop.
    """

    def __init__(self, service: Service, grace: float, **settings: object) -> None:
        app, limits = service.app(), service.limits
        connection = partial(
            Connection,
            head_timeout=limits.body_timeout,
            max_connections=limits.max_connections,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,  # type: ignore[arg-type]
                log_level="warning",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
                **settings,  # type: ignore[arg-type]
            )
        )
        self.service, self.grace = service, grace
        service.worker.on_failure = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()  # returns after the signal to stop
        await self.service.drain(self.grace, lambda: self.force_exit)
