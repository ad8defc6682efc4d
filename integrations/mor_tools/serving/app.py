"""The HTTP application: completions, chat, models, health and metrics."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mor_layers.generation import Event
from mor_tools.serving.access import Access, AccessControl
from mor_tools.serving.calls import chat, completions
from mor_tools.serving.calls.fields import BadRequestError
from mor_tools.serving.calls.protocol import Bounds, Call, Usage, failure
from mor_tools.serving.engines.metrics import prometheus
from mor_tools.serving.engines.replicas import Replicas
from mor_tools.serving.engines.worker import EngineWorker, OverloadedError, UnavailableError
from mor_tools.serving.errors import ServiceError
from mor_tools.serving.loading import ServedModel

NUM_PARSERS = 2
"""Number of threads that parse bodies, so that a large body does not delay a small one."""


Parse = Callable[[bytearray, ServedModel, Bounds, str], Call]
"""Makes a call of a body, as `completions.parse` does."""


@dataclass(frozen=True)
class Limits:
    """Limits of what clients can request."""

    max_tokens: int = 512
    """Largest number of tokens per choice."""
    max_waiting: int = 256
    """Largest number of waiting requests. Further ones get the status 429."""
    max_per_client: int = 64
    """Largest number of open (running or waiting) requests per client. Further ones get a 429."""
    max_body_bytes: int = 1 << 20
    """Largest size of a body. Larger ones get the status 413."""
    body_timeout: float = 30.0
    """Seconds within which the head of a request must arrive, and then the whole body."""
    max_connections: int = 1000
    """Largest number of connections. Further ones are closed."""
    read_timeout: float = 30.0
    """Seconds after which a stream is closed if the client does not read."""
    timeout: float | None = 120.0
    """Seconds after which a request ends. Clients can request a shorter time."""


class Service:
    """Serves requests.

    Args:
        worker: runs the engine, or the engines, which must have `decode`.
        model: the model that they run.
        access: which requests are accepted.
    """

    def __init__(
        self,
        worker: EngineWorker | Replicas,
        model: ServedModel,
        limits: Limits,
        access: Access | None = None,
    ) -> None:
        self.model, self.limits = model, limits
        self.access = Access() if access is None else access
        self.worker = worker
        self.begun = int(time.time())
        self.answers: Counter[int] = Counter()
        self._parsers = ThreadPoolExecutor(NUM_PARSERS, "parser")
        self._open: Counter[str] = Counter()  # number of open requests of each client

    def app(self) -> Starlette:
        """The ASGI application. Its shutdown stops the engine's thread."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.worker.close)
            self._parsers.shutdown(wait=False, cancel_futures=True)

        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.one_model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        control = Middleware(AccessControl, access=self.access)
        handlers = {HTTPException: _protocol_error}
        return Starlette(
            routes=routes, middleware=[control], exception_handlers=handlers, lifespan=lifespan
        )

    async def drain(self, grace: float, is_urgent: Callable[[], bool]) -> None:
        """Accept no more requests, and wait until the running ones have ended.

        Args:
            grace: seconds after which requests that are still running end with an error.
            is_urgent: whether to stop waiting before that.
        """
        self.worker.drain()
        deadline = time.monotonic() + grace
        while self.worker.has_work and time.monotonic() < deadline and not is_urgent():
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.worker.close)

    async def completions(self, http: HTTPRequest) -> Response:
        return await self._answer(http, completions.parse)

    async def chat(self, http: HTTPRequest) -> Response:
        return await self._answer(http, chat.parse)

    async def _answer(self, http: HTTPRequest, parse: Parse) -> Response:
        with ExitStack() as places:
            try:
                if not self.worker.is_alive:
                    raise _refusal(self.worker.unavailable)
                client = http.state.client
                places.enter_context(self._places(client, 1))
                call = await self._parse(parse, await self._body(http), client)
                places.enter_context(self._places(client, len(call.requests) - 1))
                streams = [self.worker.events(request) for request in call.requests]
                if call.stream:
                    response = await self._streamed(call, streams, places)
                else:
                    response = await self._whole(http, call, streams)
            except ServiceError as error:
                response = error.response()
        self.answers[response.status_code] += 1
        return response

    async def models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry]})

    async def one_model(self, http: HTTPRequest) -> Response:
        """The entry of a model in the list of all models."""
        name = http.path_params["name"]
        if name != self.model.name:
            message = f"model {name[:80]!r} is not served. Use {self.model.name!r}."
            return ServiceError(404, message).response()
        return JSONResponse(self._entry)

    @property
    def _entry(self) -> dict[str, Any]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.begun,
            "owned_by": "mor_layers",
            "max_model_len": self.worker.max_length,  # as vLLM has it
        }

    async def health(self, _: HTTPRequest) -> Response:
        """Whether the server accepts requests. It does not after the signal to stop."""
        is_alive = self.worker.is_alive
        return PlainTextResponse("ok" if is_alive else "down", 200 if is_alive else 503)

    async def metrics(self, _: HTTPRequest) -> Response:
        """Metrics in the text format of Prometheus."""
        text = prometheus(self.worker.statistics, self.answers)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @contextmanager
    def _places(self, client: str, count: int) -> Iterator[None]:
        """Count `count` more requests as open requests of a client.

        Raises:
            ServiceError: the client has too many open requests.
        """
        wanted, most = self._open[client] + count, self.limits.max_per_client
        if wanted > most:
            raise ServiceError(
                429,
                f"this client would have {wanted} open requests, but {most} are allowed. Try again "
                "when some have ended.",
            )
        self._open[client] += count
        try:
            yield
        finally:
            self._open[client] -= count
            if not self._open[client]:
                del self._open[client]

    async def _body(self, http: HTTPRequest) -> bytearray:
        """Receive the body, which must be JSON, within the limits of size and time."""
        limits = self.limits
        kind, _, options = http.headers.get("content-type", "").lower().partition(";")
        if kind.strip() != "application/json" or options.strip() not in ("", "charset=utf-8"):
            # Browsers let any web page post plain text to this server, but JSON only with its
            # consent. See `access`.
            raise ServiceError(415, "send JSON in UTF-8, with `Content-Type: application/json`.")
        if http.headers.get("content-encoding", "identity") != "identity":
            raise ServiceError(415, "send the body uncompressed, without a Content-Encoding.")
        too_large = ServiceError(413, f"the body exceeds {limits.max_body_bytes} bytes.")
        if int(http.headers.get("content-length", 0)) > limits.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_timeout):
                async for part in http.stream():
                    body += part
                    if len(body) > limits.max_body_bytes:
                        raise too_large
        except TimeoutError as error:
            raise ServiceError(
                408, f"the body did not arrive within {limits.body_timeout} seconds."
            ) from error
        except ClientDisconnect as error:
            raise ServiceError(499, "the client has disconnected.") from error
        return body

    async def _parse(self, parse: Parse, body: bytearray, client: str) -> Call:
        limits, longest = self.limits, self.worker.max_length
        bounds = Bounds(limits.max_tokens, longest, limits.timeout)
        try:
            # Tokenizing a long prompt in the event loop would delay the events of all clients.
            return await asyncio.get_running_loop().run_in_executor(
                self._parsers, parse, body, self.model, bounds, client
            )
        except BadRequestError as error:
            raise ServiceError(error.status, str(error), error.parameter) from error

    async def _whole(
        self, http: HTTPRequest, call: Call, streams: list[AsyncIterator[Event]]
    ) -> Response:
        usage = Usage(sum(len(request.ids) for request in call.requests))
        answers = asyncio.gather(*(_collected(stream) for stream in streams))
        left = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait([answers, left], return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise ServiceError(499, "the client has disconnected.")
            texts = await answers
            for event in chain.from_iterable(texts):
                usage.add(event)
            pairs = zip(call.choices, texts, strict=True)
            response = call.response([c.whole(events) for c, events in pairs], is_part=False)
            return JSONResponse(response | {"usage": usage.as_dict()})
        finally:
            answers.cancel()
            left.cancel()
            await asyncio.gather(answers, left, return_exceptions=True)

    async def _streamed(
        self, call: Call, streams: list[AsyncIterator[Event]], places: ExitStack
    ) -> Response:
        # The first event determines the HTTP status, which cannot change once the stream has begun.
        merged = _merged(streams)
        try:
            first = await anext(merged)
        except ServiceError:
            await merged.aclose()
            raise
        lines = self._lines(call, first, merged)
        return _EventStream(lines, self.limits.read_timeout, places.pop_all())

    async def _lines(
        self, call: Call, first: tuple[int, Event], rest: AsyncIterator[tuple[int, Event]]
    ) -> AsyncGenerator[str]:
        usage = Usage(sum(len(request.ids) for request in call.requests))
        try:
            yield self._line(call, first, usage)
            async for item in rest:
                yield self._line(call, item, usage)
            if call.usage.at_end:
                yield _data(call.response([], is_part=True) | {"usage": usage.as_dict()})
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield _data(error.body)
        finally:
            await rest.aclose()  # type: ignore[attr-defined]

    def _line(self, call: Call, item: tuple[int, Event], usage: Usage) -> str:
        index, event = item
        usage.add(event)
        part = call.response([call.choices[index].part(event)], is_part=True)
        return _data(part | ({"usage": usage.as_dict()} if call.usage.always else {}))


class _EventStream(StreamingResponse):
    """Server-sent events that end if the client stops reading.

    Args:
        lines: the lines to send. The generator is closed at the end in any case.
        timeout: seconds after which the stream ends if the client does not read.
        places: counts the requests as open. It is closed at the end.
    """

    def __init__(self, lines: AsyncGenerator[str], timeout: float, places: ExitStack) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self.lines, self.timeout, self.places = lines, timeout, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self.timeout):
                await send(message)

        with self.places:
            try:
                await super().__call__(scope, receive, send_in_time)
            except TimeoutError:
                pass  # the response is incomplete, so the server closes the connection
            finally:
                await self.lines.aclose()


async def _protocol_error(http: HTTPRequest, error: Exception) -> Response:
    """The response to a path or a method that is not served."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path[:80]} is not served: {error.detail}."
    return ServiceError(error.status_code, message, headers=error.headers).response()


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _checked(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events of a request. An unsuccessful end is raised as an error."""
    try:
        async for event in events:
            failed = failure(event)
            if failed is not None:
                raise ServiceError(*failed)
            yield event
    except ValueError as error:
        raise ServiceError(400, str(error)) from error
    except (OverloadedError, UnavailableError) as error:
        raise _refusal(error) from error
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _refusal(error: OverloadedError | UnavailableError) -> ServiceError:
    status = 429 if isinstance(error, OverloadedError) else 503
    return ServiceError(status, f"{error}. Try again later.")


async def _collected(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in _checked(events)]


async def _merged(streams: list[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests as they arrive, each with the index of its request."""
    events: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def forward(index: int, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in _checked(stream):
                events.put_nowait((index, event))
            events.put_nowait(None)
        except Exception as error:  # raised again in the reader
            events.put_nowait(error)

    tasks = [asyncio.create_task(forward(i, s)) for i, s in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await events.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
