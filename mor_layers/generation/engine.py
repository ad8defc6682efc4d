"""DepthBatchingEngine: serves requests that come and go, from one pool of tokens at any depth.

    engine = DepthBatchingEngine(model, CacheSettings(kv_bytes=1 << 28))
    for event in engine.stream(Request(ids=(1, 2, 3), max_new_tokens=20)):
        print(event.token, event.depth)

A scheduler that knows nothing of layers (`scheduling`) says which tokens enter; a runner that knows
nothing of requests (`runner`) runs them. Not thread safe: one thread calls.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mor_layers.generation.cache import CacheSettings
from mor_layers.generation.runner import Finished, ModelRunner
from mor_layers.generation.sampling import Sampler, has_distribution, sample
from mor_layers.generation.scheduling import FinishReason, Progress, Request, Scheduler
from mor_layers.generation.text_stream import TextStream
from mor_layers.models import MoRTransformer

NOT_FINITE = (
    "the model's logits are not finite, so no next token can be picked. Check the weights, or run the "
    "model in a wider precision."
)


@dataclass(frozen=True)
class Event:
    """An event of one request."""

    number: int
    """Which request, as `submit` named it."""
    token: int | None = None
    """The token generated; None where there is none, as when a request is given up."""
    depth: int | None = None
    """Steps that the token it follows took: what computing it cost."""
    prompt_depths: tuple[int, ...] = ()
    """Steps that each token of the prompt took; with the first token only."""
    text: str = ""
    """Text that is certain now: what may begin a stop string is held back."""
    finish_reason: FinishReason | None = None
    """Why the request ended, in its last event."""
    error: str = ""
    """What went wrong, where `finish_reason` is "error"."""


@dataclass
class Counters:
    """What an engine has done since it was built."""

    ticks: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts computed, again after a preemption too."""
    generated_tokens: int = 0
    steps: int = 0
    """Recursion steps that all those tokens took."""
    preemptions: int = 0
    finished: int = 0


class DepthBatchingEngine:
    """Continuous depth-wise batching.

    Args:
        model: what to serve.
        cache: memory for keys and values.
        chunk_size: longest piece of a prompt that is computed at once.
        tokens_per_tick: tokens that may enter in one tick; bounds how long others wait for a
            prompt. Default: `num_slots + chunk_size`.
        decode: text of token ids; needed for stop strings and `Event.text`.
        sampler: picks tokens, see `mor_layers.generation.sampling.sample`.
        clock: seconds, for timeouts.

    Raises:
        ValueError: a size below 1, or memory for less than one page.
    """

    def __init__(
        self,
        model: MoRTransformer,
        cache: CacheSettings,
        chunk_size: int = 64,
        tokens_per_tick: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        sampler: Sampler = sample,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if tokens_per_tick is None:
            tokens_per_tick = cache.num_slots + chunk_size
        if chunk_size < 1 or tokens_per_tick < 1:
            raise ValueError(
                f"chunk_size={chunk_size} and tokens_per_tick={tokens_per_tick} must be at least 1."
            )
        self.runner = ModelRunner(model, cache, chunk_size)
        self.caches = self.runner.caches
        self.scheduler = Scheduler(
            cache.num_slots,
            self.caches.pages,
            self.caches.demand,
            chunk_size,
            tokens_per_tick,
            clock,
        )
        self.vocab_size = model.config.vocab_size
        self.decode, self.sampler = decode, sampler
        self.counters = Counters()
        self._open: dict[int, Progress] = {}
        self._texts: dict[int, TextStream] = {}
        self._prompt_depths: dict[int, list[int]] = {}
        self._pending: list[Event] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._open and not self._pending

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            ValueError: it can never be served: too long, unknown tokens, or stop strings without
                an engine that decodes.
        """
        longest = self.caches.settings.max_length
        if len(request.ids) + request.max_new_tokens > longest:
            raise ValueError(
                f"{len(request.ids)} tokens of prompt and max_new_tokens="
                f"{request.max_new_tokens} exceed max_length={longest}. Ask for fewer."
            )
        if not all(0 <= i < self.vocab_size for i in request.ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, the model's vocabulary.")
        if request.stop and self.decode is None:
            raise ValueError("stop strings need an engine with `decode`. Use stop_ids, or give it.")
        progress = self.scheduler.submit(request)
        self._open[progress.number] = progress
        self._prompt_depths[progress.number] = []
        if self.decode is not None:
            self._texts[progress.number] = TextStream(self.decode, request.stop)
        return progress.number

    def cancel(self, number: int) -> bool:
        """Give a request up; False where it has ended already. Its last event comes with the next
        `step`."""
        progress = self._open.get(number)
        if progress is None:
            return False
        self._pending.append(self._finish(progress, "cancelled"))
        return True

    def stream(self, request: Request) -> Iterator[Event]:
        """Submit a request and run until it has ended; events of others are not reported."""
        number = self.submit(request)
        return self._follow(number)

    def step(self) -> list[Event]:
        """Run one tick: every token in flight goes once through the block.

        Returns:
            What happened, in order; at most one new token a request.
        """
        for progress in self.scheduler.overdue():
            self._pending.append(self._finish(progress, "timeout"))
        self._admit()
        finished = self.runner.tick(self.scheduler.plan(), self._make_room)
        self.counters.ticks += 1
        events = self._generated(finished)
        pending, self._pending = self._pending, []
        return pending + events

    def run(self) -> Iterator[Event]:
        """Events until every request has ended."""
        while not self.is_idle:
            yield from self.step()

    def _follow(self, number: int) -> Iterator[Event]:
        try:
            while number in self._open or self._pending:
                for event in self.step():
                    if event.number == number:
                        yield event
        finally:  # the caller may stop listening
            self.cancel(number)

    def _admit(self) -> None:
        """Requests that wait get slots; who runs more than its share gives way in the end."""
        self.scheduler.admit(self.caches.pages_free)
        while (progress := self.scheduler.unfair()) is not None:
            self.runner.drop(self._preempt(progress))
            self.scheduler.admit(self.caches.pages_free)

    def _make_room(self) -> int:
        """A sequence gives way: the last one begins again later; the only one cannot go on."""
        progress = self.scheduler.last()
        if progress is not None:
            return self._preempt(progress)
        ((slot, progress),) = self.scheduler.running.items()
        self._pending.append(self._finish(progress, "memory", drop=False))
        return slot

    def _preempt(self, progress: Progress) -> int:
        """Let a sequence wait again; returns the slot, which is the caller's to drop."""
        slot = progress.slot
        assert slot is not None
        self.scheduler.preempt(progress)
        self.counters.preemptions += 1
        return slot

    def _generated(self, finished: Finished) -> list[Event]:
        done = []
        for entry in finished.spans:
            progress = self.scheduler.running[entry.span.slot]
            progress.in_flight = 0
            self.counters.steps += sum(entry.depths)
            if entry.span.start < len(progress.request.ids):
                self.counters.prompt_tokens += len(entry.depths)
                known = self._prompt_depths[progress.number]
                known[entry.span.start :] = entry.depths
            if entry.span.is_last:
                done.append((progress, entry.depths[-1]))
        if not done:
            return []
        settings = [progress.request.sampling for progress, _ in done]
        numbers = [progress.num_generated for progress, _ in done]
        # Logits that are no distribution end their own request; the sampler gets zeros instead.
        is_defined = has_distribution(finished.logits)
        logits = finished.logits.where(is_defined[:, None], 0.0)
        picked = self.sampler(logits, settings, numbers)
        tokens = picked.where(is_defined, -1).tolist()  # one wait for the device
        return [self._advance(p, token, d) for (p, d), token in zip(done, tokens, strict=True)]

    def _advance(self, progress: Progress, token: int, depth: int) -> Event:
        """Add a token to a sequence; -1: none could be picked."""
        if token < 0:
            return self._finish(progress, "error", error=NOT_FINITE)
        progress.tokens.append(token)
        self.counters.generated_tokens += 1
        is_first = progress.num_generated == 1
        request = progress.request
        prompt_depths = self._prompt_depths[progress.number][: len(request.ids)] if is_first else ()
        reason: FinishReason | None = None
        text, met_stop = "", False
        if self.decode is not None:
            try:
                text, met_stop = self._texts[progress.number].push(token)
            except Exception as raised:  # the tokenizer's, about this text
                return self._finish(progress, "error", error=_undecodable(raised))
        if met_stop or token in request.stop_ids:
            reason = "stop"
        elif progress.num_generated == request.max_new_tokens:
            reason = "length"
        event = Event(progress.number, token, depth, tuple(prompt_depths), text)
        if reason is None:
            return event
        end = self._finish(progress, reason)
        return replace(
            event, text=text + end.text, finish_reason=end.finish_reason, error=end.error
        )

    def _finish(
        self, progress: Progress, reason: FinishReason, drop: bool = True, error: str = ""
    ) -> Event:
        slot = progress.slot
        self.scheduler.leave(progress)
        if slot is not None and drop:
            self.runner.drop(slot)
        del self._open[progress.number], self._prompt_depths[progress.number]
        stream = self._texts.pop(progress.number, None)
        self.counters.finished += 1
        text = ""
        if stream is not None and reason != "error":
            try:
                text = stream.rest()
            except Exception as raised:  # the tokenizer's, about this text
                reason, error = "error", _undecodable(raised)
        return Event(progress.number, text=text, finish_reason=reason, error=error)


def _undecodable(raised: Exception) -> str:
    return f"the tokens could not be decoded: {type(raised).__name__}: {raised}"
