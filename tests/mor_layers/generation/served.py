"""Requests through an engine, with what a comparison needs: logits and depths of every token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mor_layers import MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling
from mor_layers.generation.sampling import sample
from tests.mor_layers.small_models import random_ids


@dataclass
class Served:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Of each token of prompt and continuation but the last."""
    cached_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str = ""


class Recorder:
    """An engine that notes the logits of each request."""

    def __init__(self, model: MoRTransformer, kv_bytes: int = 1 << 20, **arguments: Any) -> None:
        cache = {"num_slots": 4, "max_length": 64, "page_size": 4}
        cache |= {name: arguments.pop(name) for name in list(arguments) if name in cache}
        cache |= {
            n: arguments.pop(n)
            for n in ("is_int8", "is_fp8", "shares", "prefix_sharing")
            if n in arguments
        }
        settings = CacheSettings(kv_bytes, **cache)
        self.engine = DepthBatchingEngine(model, settings, sampler=self._sample, **arguments)
        self.served: dict[int, Served] = {}
        self._logits: dict[tuple[int, int], Tensor] = {}

    def _sample(
        self, logits: Tensor, settings: Sequence[Sampling], numbers: Sequence[int]
    ) -> Tensor:
        for row, own, number in zip(logits, settings, numbers, strict=True):
            self._logits[own.seed, number] = row.clone()
        return sample(logits, settings, numbers)

    def submit(self, request: Request) -> int:
        """As the engine's; the seed becomes the request's number."""
        upcoming = len(self.served)
        seeded = replace(request, sampling=replace(request.sampling, seed=upcoming))
        number = self.engine.submit(seeded)
        assert number == upcoming
        self.served[number] = Served()
        return number

    def step(self) -> None:
        for event in self.engine.step():
            own = self.served[event.number]
            assert own.finish_reason is None, "news of a request that has ended"
            own.finish_reason, own.text = event.finish_reason, own.text + event.text
            own.error = event.error
            if event.token is not None:
                own.logits.append(self._logits[event.number, len(own.tokens)])
                own.tokens.append(event.token)
                own.depths += event.prompt_depths or (event.depth,)
                own.cached_tokens += event.cached_tokens

    def finish(self) -> list[Served]:
        """Run until all have ended; the caches must be empty then."""
        for _ in range(5000):
            if self.engine.is_idle:
                break
            self.step()
        assert self.engine.is_idle, "requests that never end"
        assert self.engine.caches.num_bytes_in_use == 0
        assert self.engine.caches.pages_free == self.engine.caches.pages
        assert self.engine.prefixes.pages_borrowed == [0, 0]
        return list(self.served.values())


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random_ids(1, length, seed)[0].tolist())


def serve(model: MoRTransformer, requests: Sequence[Request], **arguments: Any) -> list[Served]:
    """All requests at once."""
    recorder = Recorder(model, **arguments)
    for request in requests:
        recorder.submit(request)
    return recorder.finish()


@torch.no_grad()
def full_forward(
    model: MoRTransformer, request: Request, served: Served
) -> tuple[Tensor, list[int]]:
    """Logits that the continuation was picked from, and depths, by one pass over the whole text."""
    ids = torch.tensor([[*request.ids, *served.tokens]])
    output = model.eval()(ids, causal_routing=True)
    return output.logits[0, len(request.ids) - 1 : -1], output.depths[0, :-1].tolist()


def assert_exact(
    model: MoRTransformer, request: Request, served: Served, tolerance: float = 1e-5
) -> None:
    """The engine's logits and depths are those of the full forward pass."""
    logits, depths = full_forward(model, request, served)
    torch.testing.assert_close(torch.stack(served.logits), logits, rtol=tolerance, atol=tolerance)
    assert served.depths == depths
