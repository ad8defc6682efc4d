"""The process around the application: how it stops."""

import uvicorn

from mor_tools.serving.app import Service

FLUSH_SECONDS = 3
"""For answers that are written but not yet sent when all calls have ended."""


class Server(uvicorn.Server):
    """Told to stop, goes on listening until its calls have ended, so that new ones are told why not.

    A second signal ends it at once. So does an engine that fails: nothing could be answered any more,
    and whoever supervises the process must see it end.

    Args:
        grace: seconds that running calls have when the server is told to stop.
    """

    def __init__(self, service: Service, grace: float, **settings: object) -> None:
        app = service.app()
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=FLUSH_SECONDS,
                **settings,  # type: ignore[arg-type]
            )
        )
        self.service, self.grace = service, grace
        service.worker.on_failure = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()  # until told to stop
        await self.service.drain(self.grace, lambda: self.force_exit)
