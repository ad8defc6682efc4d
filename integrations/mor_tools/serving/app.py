"""The HTTP application: completions, the model's name, health and metrics."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mor_layers.generation import DepthBatchingEngine, Event
from mor_tools.serving.loading import Tokenizer
from mor_tools.serving.protocol import BadRequestError, Call, Usage, choice, failure, parse
from mor_tools.serving.worker import EngineWorker, OverloadedError


@dataclass(frozen=True)
class Limits:
    """What callers may ask for."""

    max_tokens: int = 512
    """Tokens that a choice may ask for."""
    max_waiting: int = 256
    """Requests that may wait; more are answered with 429."""
    max_body_bytes: int = 1 << 20
    """Size of a body; larger ones are answered with 413."""
    timeout: float | None = 120.0
    """Seconds after which a request is given up; callers may ask for fewer."""


class ServiceError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter

    @property
    def body(self) -> dict[str, Any]:
        """As the protocol wants it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.parameter,
                "code": self.status,
            }
        }


class Service:
    """Answers calls with one engine.

    Args:
        engine: with `decode`.
        name: of the model.
    """

    def __init__(
        self, engine: DepthBatchingEngine, name: str, tokenizer: Tokenizer, limits: Limits
    ) -> None:
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.worker = EngineWorker(engine, limits.max_waiting)
        self.answers: Counter[int] = Counter()

    def app(self) -> Starlette:
        """The ASGI application. Its shutdown ends the engine's thread."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.worker.close)

        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def completions(self, http: HTTPRequest) -> Response:
        try:
            call = await self._parse(http)
            streams = [self.worker.events(request) for request in call.requests]
            if call.stream:
                response = await self._streamed(call, streams)
            else:
                response = await self._whole(http, call, streams)
        except ServiceError as error:
            response = JSONResponse(error.body, error.status)
        self.answers[response.status_code] += 1
        return response

    async def models(self, _: HTTPRequest) -> Response:
        entry = {"id": self.name, "object": "model", "created": 0, "owned_by": "mor_layers"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, _: HTTPRequest) -> Response:
        is_alive = self.worker.is_alive
        return PlainTextResponse("ok" if is_alive else "down", 200 if is_alive else 503)

    async def metrics(self, _: HTTPRequest) -> Response:
        """In Prometheus' text format."""
        engine = self.worker.engine
        counters, caches = engine.counters, engine.caches
        rows = [
            ("ticks_total", "counter", "Runs of the shared block.", counters.ticks),
            ("prompt_tokens_total", "counter", "Prompt tokens computed.", counters.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens generated.", counters.generated_tokens),
            ("recursion_steps_total", "counter", "Steps that tokens took.", counters.steps),
            ("preemptions_total", "counter", "Sequences that gave way.", counters.preemptions),
            ("requests_finished_total", "counter", "Requests that ended.", counters.finished),
            ("requests_running", "gauge", "Requests that have a slot.", engine.num_running),
            ("requests_waiting", "gauge", "Requests that wait for one.", engine.num_waiting),
            ("kv_bytes", "gauge", "Bytes for keys and values.", caches.num_bytes),
            ("kv_bytes_in_use", "gauge", "Bytes of pages in use.", caches.num_bytes_in_use),
        ]
        lines = []
        for name, kind, text, value in rows:
            lines += [
                f"# HELP mor_{name} {text}",
                f"# TYPE mor_{name} {kind}",
                f"mor_{name} {value}",
            ]
        lines += ["# HELP mor_answers_total Answers by status.", "# TYPE mor_answers_total counter"]
        lines += [f'mor_answers_total{{status="{s}"}} {n}' for s, n in sorted(self.answers.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _parse(self, http: HTTPRequest) -> Call:
        body, limits = b"", self.limits
        async for part in http.stream():
            body += part
            if len(body) > limits.max_body_bytes:
                raise ServiceError(413, f"the body exceeds {limits.max_body_bytes} bytes.")
        try:
            return parse(
                json.loads(body), self.name, self.tokenizer, limits.max_tokens, limits.timeout
            )
        except BadRequestError as error:
            raise ServiceError(400, str(error), error.parameter) from error
        except ValueError as error:  # no JSON, or no UTF-8
            raise ServiceError(400, f"the body is no JSON: {error}.") from error

    async def _whole(
        self, http: HTTPRequest, call: Call, streams: list[AsyncIterator[Event]]
    ) -> Response:
        usage = Usage(sum(len(request.ids) for request in call.requests))
        answers = asyncio.gather(*(_collect(i, s, usage) for i, s in enumerate(streams)))
        left = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait([answers, left], return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise ServiceError(499, "the caller has left.")
            return JSONResponse(call.chunk(await answers) | {"usage": usage.as_dict()})
        finally:
            answers.cancel()
            left.cancel()
            await asyncio.gather(answers, left, return_exceptions=True)

    async def _streamed(self, call: Call, streams: list[AsyncIterator[Event]]) -> Response:
        # The first event decides about the status, which cannot change afterwards.
        merged = _merged(streams)
        try:
            first = await anext(merged)
        except ServiceError:
            await merged.aclose()
            raise
        return StreamingResponse(self._lines(call, first, merged), media_type="text/event-stream")

    async def _lines(
        self, call: Call, first: tuple[int, Event], rest: AsyncIterator[tuple[int, Event]]
    ) -> AsyncIterator[str]:
        usage = Usage(sum(len(request.ids) for request in call.requests))
        try:
            yield self._line(call, first, usage)
            async for item in rest:
                yield self._line(call, item, usage)
            if call.include_usage:
                yield _data(call.chunk([]) | {"usage": usage.as_dict()})
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield _data(error.body)
        finally:
            await rest.aclose()  # type: ignore[attr-defined]

    def _line(self, call: Call, item: tuple[int, Event], usage: Usage) -> str:
        index, event = item
        usage.completion_tokens += event.token is not None
        depths = [] if event.depth is None else [event.depth]
        return _data(call.chunk([choice(index, event.text, event.finish_reason, depths)]))


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _checked(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events of a request; an ending that is no answer becomes an error."""
    try:
        async for event in events:
            failed = failure(event)
            if failed is not None:
                raise ServiceError(*failed)
            yield event
    except ValueError as error:
        raise ServiceError(400, str(error)) from error
    except OverloadedError as error:
        raise ServiceError(429, f"{error}. Try again later.") from error
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _collect(index: int, events: AsyncIterator[Event], usage: Usage) -> dict[str, Any]:
    text, reason, depths = "", None, []
    async for event in _checked(events):
        text, reason = text + event.text, event.finish_reason
        if event.token is not None:
            usage.completion_tokens += 1
            depths.append(event.depth)
    return choice(index, text, reason, depths)


async def _merged(streams: list[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several requests, with their index, as they come."""
    events: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def forward(index: int, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in _checked(stream):
                events.put_nowait((index, event))
            events.put_nowait(None)
        except Exception as error:  # handed on to whoever reads
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
