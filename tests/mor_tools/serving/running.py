"""A server in this process, on a free port, with what its tests ask of it."""

import argparse
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import openai

from mor_layers.generation import DepthBatchingEngine, Request, Sampling
from mor_tools.commands import parser, serve
from mor_tools.serving import loading
from mor_tools.serving.app import Service
from mor_tools.serving.engines.worker import EngineWorker
from mor_tools.serving.server import Server

SIZES = ["--slots", "4", "--max-length", "128", "--kv-mib", "1", "--max-tokens", "100"]


def options_of(*arguments: str) -> argparse.Namespace:
    """What the command line means."""
    return parser().parse_args(["serve", *arguments])


def engine_of(options: argparse.Namespace) -> DepthBatchingEngine:
    """The engine of a server with these options."""
    wanted = serve.engine_options(options)
    return wanted.engine(wanted.load())


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "what is waited for does not happen"
        time.sleep(0.01)


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, *arguments: str) -> None:
        options = options_of(*SIZES, *arguments)
        self.service: Service = serve.build(options)
        self.server = Server(self.service, options.grace)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def engine(self) -> DepthBatchingEngine:
        assert isinstance(self.service.worker, EngineWorker)
        assert isinstance(self.service.worker.engine, DepthBatchingEngine)
        return self.service.worker.engine

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        self.socket.close()

    def alone(self, prompt: str, max_tokens: int, **settings) -> str:
        """What an engine of one's own says."""
        served = loading.load(None)
        cache = self.engine.caches.settings
        engine = DepthBatchingEngine(served.model, cache, decode=served.tokenizer.decode)
        request = Request(tuple(prompt.encode()), max_tokens, Sampling(**settings))
        return "".join(event.text for event in engine.stream(request))

    def post(self, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
        """A call that a client library would not make."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return httpx.post(
            f"{self.url}/v1/completions", content=content, headers=headers, timeout=30
        )

    def slow_down(self, seconds: float = 0.01) -> None:
        """Let every tick take so long."""
        step = self.engine.step
        self.engine.step = lambda: time.sleep(seconds) or step()  # type: ignore[method-assign]

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.engine.is_idle)
        assert self.engine.caches.num_bytes_in_use == 0


@contextmanager
def running(*arguments: str) -> Iterator[Running]:
    own = Running(*arguments)
    try:
        yield own
    finally:
        own.stop()
