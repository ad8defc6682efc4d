"""`make soak`: thousands of small calls to one server, many of which end early or cannot be served.

    whole, streamed, read slowly    answered with the text that an engine of one's own gives
    left                            the caller hangs up
    late                            its time limit is too short, and sometimes just long enough
    impossible                      refused with status 400 or 404 and the reason
    hostile                         a body of `body_cases`, served or refused with 4xx and a reason

More callers come at once than the server takes; most of those that it turns away try again. The cache
holds fewer texts than run at once, so that texts give way to others and are taken up again. In the end
nothing may be left of all this: requests, pages of the cache, open calls, threads, memory.
"""

import argparse
import asyncio
import json
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx

from mor_layers.generation import CacheSettings, DepthBatchingEngine
from mor_tools.serving.calls import completions
from mor_tools.serving.calls.protocol import Bounds
from tests.campaigns.body_cases import TEMPLATE, hostile_body
from tests.mor_tools.serving.running import Running

SERVER = ["--slots", "8", "--max-length", "48", "--kv-mib", "0.15", "--chunk-size", "16"]
SERVER += ["--max-tokens", "16", "--max-waiting", "20", "--max-per-client", "24"]
CLIENTS = ("a", "b", "c")
"""Their API keys. Each has its own share of the server, and its own cache of prompts."""
CALLERS = 24
"""Calls that are open at once."""
KINDS = {"whole": 30, "streamed": 25, "read slowly": 3, "left": 12, "late": 8}
KINDS |= {"impossible": 7, "hostile": 15}
"""How many of a hundred calls are of each kind."""
IMPOSSIBLE: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": "x" * 60},
    {"prompt": [300]},
    {"prompt": "x", "max_tokens": 17},
    {"prompt": "x", "n": 40},
    {"prompt": "x", "model": "another"},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "depth": 3},
]
MOST_GROWTH = 48 << 20
"""Bytes by which the process may grow after a third of the calls; caches fill up at the beginning."""


class Soak:
    """Calls to one server, and what became of them.

    Args:
        count: number of calls.
        seed: other seeds, other calls.
        num_bodies: number of different bodies of calls that are answered.
        first: number of the first call. A call depends only on its number and the seed, so a soak can
            go on where another one ended, or repeat the calls around a failure.
    """

    def __init__(
        self, server: Running, count: int, seed: int = 0, num_bodies: int = 40, first: int = 0
    ) -> None:
        self.server, self.count, self.seed, self.first = server, count, seed, first
        self.endings: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        source = random.Random(seed)
        self.bodies = [_body(source) for _ in range(num_bodies)]
        self.texts = list(map(_Alone(server), self.bodies))
        self._memory = 0

    def run(self, every: int = 500, told: Callable[[int], None] = lambda done: None) -> None:
        """Make all calls, and wait until the server has nothing left to do.

        Args:
            every: number of calls after which `told` is called with how many are done.
        """
        threads = threading.active_count()
        self._every, self._told = every, told
        asyncio.run(self._run())
        self.server.wait_until_idle()
        service, engine = self.server.service, self.server.engine
        left = {
            "requests": engine.num_running + engine.num_waiting + service.worker.has_work,
            "bytes of the cache": engine.caches.num_bytes_in_use,
            "open calls": sum(service._open.values()),
            "threads": max(0, threading.active_count() - threads - 2),  # those that parse bodies
        }
        self.failures += [f"{number} {name} are left" for name, number in left.items() if number]
        if self.growth > MOST_GROWTH:
            self.failures.append(f"the process grew by {self.growth / 2**20:.0f} MiB")

    async def _run(self) -> None:
        numbers = iter(range(self.first, self.first + self.count))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CALLERS)
        async with httpx.AsyncClient(
            base_url=self.server.url, limits=limits, timeout=120.0
        ) as http:
            await asyncio.gather(*(self._call_all(http, numbers) for _ in range(CALLERS)))

    async def _call_all(self, http: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            source = random.Random(f"{self.seed} {number}")
            (kind,) = source.choices(list(KINDS), list(KINDS.values()))
            try:
                ending = await _Call(self, http, source).make(kind)
            except Exception as error:
                self.failures.append(f"call {number}, {kind}: {type(error).__name__}: {error}")
                ending = "failed"
            self.endings[kind, ending] += 1
            done = self.endings.total()
            if done == max(1, self.count // 3):
                self._memory = _peak_memory()
            if done % self._every == 0:
                self._told(done)

    @property
    def growth(self) -> int:
        """Bytes by which the process grew after a third of the calls."""
        return _peak_memory() - self._memory

    def table(self) -> str:
        """How many calls of each kind ended how."""
        rows = [
            f"{number:7,}  {kind:11}  {end}" for (kind, end), number in sorted(self.endings.items())
        ]
        return "\n".join(rows)


class _Alone:
    """What an engine that serves a single request answers: the text of each choice."""

    def __init__(self, server: Running) -> None:
        self.model = server.service.model
        settings = CacheSettings(1 << 20, 1, 48, prefix_sharing="off")
        self.engine = DepthBatchingEngine(
            self.model.model, settings, decode=self.model.tokenizer.decode
        )

    def __call__(self, body: dict[str, Any]) -> list[str]:
        call = completions.parse(json.dumps(body).encode(), self.model, Bounds(16, 48, 60.0), "")
        return ["".join(e.text for e in self.engine.stream(request)) for request in call.requests]


class _Call:
    """One call of a kind."""

    def __init__(self, soak: Soak, http: httpx.AsyncClient, source: random.Random) -> None:
        self.soak, self.http, self.source = soak, http, source
        self.headers = {"authorization": f"Bearer {source.choice(CLIENTS)}"}
        place = source.randrange(len(soak.bodies))
        self.body, self.texts = soak.bodies[place], soak.texts[place]

    async def make(self, kind: str) -> str:
        """Make it, mostly until the server takes it, and check the answer. Returns how it ended."""
        while True:
            ending = await self._make(kind)
            if ending != "429" or self.source.random() < 0.1:
                return ending
            await asyncio.sleep(0.05)

    async def _make(self, kind: str) -> str:
        if kind == "whole":
            return self._whole(await self._post(self.body))
        if kind == "late":
            limit = 10 ** self.source.uniform(-7, 0.7)  # also shorter than any tick
            return self._whole(await self._post(self.body | {"timeout": limit}))
        if kind == "left":
            return await self._leave()
        if kind == "impossible":
            body = self.source.choice(IMPOSSIBLE)
            answer = await self._post(body | {"stream": self.source.random() < 0.5})
            return self._refused(answer, (404,) if "model" in body else (400,))
        if kind == "hostile":
            return await self._hostile()
        return await self._streamed(pause=0.03 if kind == "read slowly" else 0.0)

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post("/v1/completions", json=body, headers=self.headers)

    def _whole(self, answer: httpx.Response) -> str:
        if answer.status_code != 200:
            return self._refused(answer, (504,))
        texts = [choice["text"] for choice in answer.json()["choices"]]
        assert texts == self.texts, f"{self.body}: {texts} instead of {self.texts}"
        return "answered"

    async def _streamed(self, pause: float) -> str:
        body = self.body | {"stream": True}
        texts = [""] * len(self.texts)
        async with self.http.stream(
            "POST", "/v1/completions", json=body, headers=self.headers
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._refused(answer, ())
            async for line in answer.aiter_lines():
                content = line.removeprefix("data: ")
                if content not in ("", "[DONE]"):
                    for choice in json.loads(content)["choices"]:
                        texts[choice["index"]] += choice["text"]
                await asyncio.sleep(pause)
        assert texts == self.texts, f"{self.body}: {texts} instead of {self.texts}"
        return "answered"

    async def _leave(self) -> str:
        if self.source.random() < 0.5:
            patience = self.source.uniform(0.0, 0.05)
            try:
                return self._whole(await asyncio.wait_for(self._post(self.body), patience))
            except TimeoutError:
                return "left"
        body = self.body | {"stream": True}
        async with self.http.stream(
            "POST", "/v1/completions", json=body, headers=self.headers
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._refused(answer, ())
            await anext(answer.aiter_lines())
        return "left"

    async def _hostile(self) -> str:
        content, is_chat = hostile_body(self.source)
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        headers = self.headers | {"content-type": "application/json"}
        answer = await self.http.post(path, content=content, headers=headers)
        if answer.status_code == 200:
            return "answered"
        # A body may ask for less time than any text takes.
        late = (504,) if b"timeout" in content else ()
        return self._refused(answer, (400, 404, 413, *late))

    @staticmethod
    def _refused(answer: httpx.Response, allowed: tuple[int, ...]) -> str:
        """The status, which is one of those allowed, or says that the server is full."""
        message = answer.json()["error"]["message"]
        assert answer.status_code in (*allowed, 429), f"{answer.status_code} {message}"
        assert len(message.split()) >= 3 and len(message) < 3000, message
        return str(answer.status_code)


def _body(source: random.Random) -> dict[str, Any]:
    """A call that can be served, with a definite answer."""
    body: dict[str, Any] = {
        "prompt": "".join(source.choices("abc", k=source.choice([1, 4, 12, 30]))),
        "max_tokens": source.choice([1, 3, 8, 16]),
        "temperature": source.choice([0, 0.8]),
        "seed": source.randrange(1000),
    }
    if source.random() < 0.3:
        body |= {"n": 2, "top_p": 0.9}
    if source.random() < 0.2:
        body["stop"] = [chr(source.randrange(33, 127))]
    return body


def _peak_memory() -> int:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)


def server() -> Running:
    """A server that is too small for its callers."""
    keys = [option for client in CLIENTS for option in ("--api-key", client)]
    own = Running(*SERVER, *keys)
    own.service.model = replace(own.service.model, chat_template=TEMPLATE)
    return own


def main() -> None:
    """Run, print how calls ended and what failed; exits with 1 where something did."""
    options = argparse.ArgumentParser(prog="tests.campaigns.soak", description=__doc__)
    options.add_argument("--requests", type=int, default=10_000, help="(default: 10000)")
    options.add_argument(
        "--seed", type=int, default=0, help="other seeds, other calls (default: 0)"
    )
    options.add_argument(
        "--first", type=int, default=0, help="number of the first call, to go on from (default: 0)"
    )
    chosen = options.parse_args()
    begun, own = time.monotonic(), server()

    def tell(done: int) -> None:
        passed, failed = time.monotonic() - begun, len(soak.failures)
        print(f"{done:,} calls, {passed:.0f} seconds, {failed} failed", file=sys.stderr, flush=True)

    try:
        soak = Soak(own, chosen.requests, chosen.seed, first=chosen.first)
        soak.run(told=tell)
        preemptions = own.engine.counters.preemptions
    finally:
        own.stop()
    print(soak.table())
    took = time.monotonic() - begun
    print(
        f"{chosen.requests:,} calls in {took:.0f} seconds; {preemptions:,} times a text gave way to "
        f"others; the process grew by {soak.growth / 2**20:.0f} MiB after a third of them"
    )
    print(*soak.failures[:20], sep="\n")
    sys.exit(bool(soak.failures))


if __name__ == "__main__":
    main()
