"""Our engine, as `feed` feeds it, with a watch on what it spends outside of the model's layers."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.feed import Feed, Requests, Turn
from mor_layers import MoRTransformer
from mor_layers.generation import (
    CacheSettings,
    DepthBatchingEngine,
    Request,
    Sampling,
    calibrate,
)

HAS_GPU = torch.cuda.is_available()


def clock() -> float:
    """Processor seconds; those of the wall where a GPU works."""
    if HAS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    # Looking up the time of all threads takes 0.1 ms between products, that of one less than 1 us.
    return time.thread_time() if torch.get_num_threads() == 1 else time.process_time()


@dataclass(frozen=True)
class EngineOptions:
    """How our engine is built."""

    page_size: int = 4
    """Rows of a page; small ones waste little on short texts."""
    chunk_size: int | None = None
    """Prompt tokens in a pass. Default: the longest text, so that no prompt is cut."""
    tokens_per_tick: int | None = None
    """Default: everything that can be in flight. No prompt waits for its turn, which would hold up the
    plain model more, because its ticks are fewer."""
    compiler: str | None = None
    """Backend of `torch.compile`; None: operation by operation."""
    temperature: float = 1.0
    """Of sampling; 0 takes the most likely token."""


@dataclass(frozen=True)
class _TimedGraph:
    """A compiled tick with a clock around it."""

    run: Callable[..., Any]
    forget: Callable[[], None]
    """Compile anew."""

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


class Load:
    """Our engine, never without work.

    Args:
        kv_bytes: memory for keys and values.
    """

    def __init__(
        self, model: MoRTransformer, requests: Requests, kv_bytes: int, options: EngineOptions
    ) -> None:
        self.model, self.options = model, options
        length = requests.longest
        settings = CacheSettings(
            kv_bytes, requests.in_flight, length + 1, page_size=options.page_size
        )
        self.engine = DepthBatchingEngine(
            model,
            settings,
            options.chunk_size or length,
            tokens_per_tick=options.tokens_per_tick or requests.in_flight * length,
            compiler=options.compiler,
        )
        self.feed = Feed(self, requests, clock)
        self._numbers: dict[int, int] = {}  # the engine's, and the feed's
        self._inside = 0.0
        self.depths, self.own_shares = list[float](), list[float]()  # of each turn
        self._watch()

    @property
    def num_running(self) -> int:
        """Requests that hold a place."""
        return self.engine.num_running

    def submit(self, number: int, ids: Sequence[int], new_tokens: int) -> None:
        """Take a request."""
        sampling = Sampling(self.options.temperature, seed=number)
        self._numbers[self.engine.submit(Request(tuple(ids), new_tokens, sampling))] = number

    def step(self) -> list[int]:
        """Run one tick. Returns the numbers of requests that got a token.

        Raises:
            RuntimeError: a request ended before it had all its tokens.
        """
        events = self.engine.step()
        for event in events:
            if event.finish_reason not in (None, "length"):
                raise RuntimeError(f"a request ended with {event.finish_reason!r}: {event.error}")
        return [self._numbers[event.number] for event in events if event.token is not None]

    def run(self, tokens: int) -> Turn:
        """Generate so many tokens."""
        counters, self._inside = self.engine.counters, 0.0
        before = replace(counters)
        turn = self.feed.run(tokens)
        # The last token of a request is never computed.
        computed = turn.tokens + counters.prompt_tokens - before.prompt_tokens
        computed -= counters.finished - before.finished
        self.depths.append((counters.steps - before.steps) / computed)
        self.own_shares.append(1 - self._inside / turn.seconds)
        return turn

    @property
    def depth(self) -> float:
        """Steps that a computed token took, the median of the turns."""
        return statistics.median(self.depths)

    @property
    def own_share(self) -> float:
        """Of the time, what was spent outside of the layers and the logits, or outside of the graph of a
        compiled tick; the median of the turns."""
        return statistics.median(self.own_shares)

    def forget(self) -> None:
        """Forget the turns so far; they warmed up."""
        self.depths.clear()
        self.own_shares.clear()

    @staticmethod
    def answers(
        model: MoRTransformer, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> list[list[int]]:
        """Greedy tokens after each prompt, all in flight at once."""
        length = max(map(len, prompts)) + new_tokens
        settings = CacheSettings.for_all_steps(model, length, num_slots=len(prompts))
        engine = DepthBatchingEngine(model, settings)
        texts = {engine.submit(Request(tuple(ids), new_tokens)): list[int]() for ids in prompts}
        for event in engine.run():
            if event.token is not None:
                texts[event.number].append(event.token)
        return list(texts.values())

    def settle(self) -> None:
        """Fill the engine up, and calibrate a router on what the model itself writes.

        Twice, because what is written follows the depths of tokens, and they follow it.
        """
        slots, device = self.feed.requests.in_flight, self.model.embedding.weight.device
        self.feed.run(slots)
        if self.model.config.recursion is not None:
            for _ in range(2):
                calibrate(self.model, [self.texts.to(device)])
                self.feed.run(slots)

    @property
    def texts(self) -> Tensor:
        """Beginnings of what is in flight, `[b s]`: the longest few, as long as they all are."""
        running = self.engine.scheduler.running.values()
        texts = sorted((progress.tokens for progress in running), key=len)
        older = texts[max(len(texts) // 2, len(texts) - 12) :]
        return torch.tensor([text[: len(older[0])] for text in older])

    def _watch(self) -> None:
        """Time the layers and the logits, or the graph that is a whole tick."""
        model, runner = self.model, self.engine.runner
        if self.options.compiler is not None:  # a clock within would break the graph
            for link in runner.links:
                if link.static is not None:
                    run: Any = link.static._run
                    link.static._run = _TimedGraph(self._timed(run), run.forget)  # type: ignore
            return
        for stack in (model.prelude, *(block.layers for block in model.recursions), model.coda):
            stack.forward = self._timed(stack.forward)  # type: ignore[method-assign]
        runner.cached.logits = self._timed(runner.cached.logits)  # type: ignore[method-assign]

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = clock()
            try:
                return run(*arguments)
            finally:
                self._inside += clock() - began

        return timed
