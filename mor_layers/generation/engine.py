"""DepthBatchingEngine: serves concurrent requests from one pool of tokens at different depths.

    engine = DepthBatchingEngine(model, CacheSettings(kv_bytes=1 << 28))
    for event in engine.stream(Request(ids=(1, 2, 3), max_new_tokens=20)):
        print(event.token, event.depth)

The scheduler (`scheduling`) decides which tokens enter and knows nothing about layers. The runner
(`runner`) runs these tokens and knows nothing about requests. The engine is not thread safe: call it
from one thread.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from mor_layers.generation.cache import CacheSettings
from mor_layers.generation.events import Counters, Event
from mor_layers.generation.sampling import (
    Logprobs,
    Sampler,
    adjusted,
    constrained,
    has_distribution,
    logprobs_of,
    sample,
)
from mor_layers.generation.scheduling import FinishReason, Progress, Request, Scheduler
from mor_layers.generation.text_stream import TextStream
from mor_layers.generation.tick.graph import NUM_STOP_IDS, Backend
from mor_layers.generation.tick.runner import Finished, FinishedSpan, ModelRunner
from mor_layers.models import MoRTransformer

NOT_FINITE = (
    "the model's logits are not finite, so the next token cannot be chosen. Check the weights, or run "
    "the model in a wider precision."
)


class DepthBatchingEngine:
    """Continuous depth-wise batching.

    Args:
        model: the model to serve.
        cache: size and layout of the cache of keys and values.
        chunk_size: largest number of prompt tokens that are computed in one pass.
        tokens_per_tick: largest number of tokens that enter in one tick. This bounds how long a
            long prompt can delay other requests. Default: `num_slots + chunk_size`.
        decode: converts token ids to text. Needed for stop strings and `Event.text`.
        sampler: chooses the next tokens, see `mor_layers.generation.sampling.sample`.
        clock: returns the time in seconds. Used for timeouts.
        packs_weights: whether to compute with copies of the weights, concatenated and laid out for
            the device. They take as much memory as the weights, and are made again when weights
            change. Without them the engine is slower and computes with the model's own.
        compiler: backend of `torch.compile`, or its name, for ticks as one graph. None: ticks run
            operation by operation.
        runs_ahead: whether a tick may start before the host knows what the last one did, so that the
            device does not wait for the host. Events then come one tick later. Needs a compiler.
            Default: on GPUs, where the host does not run the graph.

    Raises:
        ValueError: a size is below 1, the model cannot be compiled, `kv_bytes` is too small for a
            single page, or ticks cannot run ahead.
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
        packs_weights: bool = True,
        compiler: Backend | None = None,
        runs_ahead: bool | None = None,
    ) -> None:
        if tokens_per_tick is None:
            tokens_per_tick = cache.num_slots + chunk_size
        if chunk_size < 1 or tokens_per_tick < 1:
            raise ValueError(
                f"chunk_size={chunk_size} and tokens_per_tick={tokens_per_tick} must be at least 1."
            )
        if runs_ahead and compiler is None:
            raise ValueError(
                "runs_ahead=True needs ticks that are graphs. Pass a compiler, or leave it out."
            )
        self.runner = ModelRunner(model, cache, chunk_size, packs_weights, compiler)
        self.caches, self.prefixes = self.runner.caches, self.runner.prefixes
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
        self._prompt_logprobs: dict[int, list[Logprobs]] = {}
        self._pending: list[Event] = []
        # A sequence that goes on without the host is not planned, so there must be room for all of them.
        self._chooses_in_graph = (
            self.runner.chooses_tokens and sampler is sample and tokens_per_tick >= cache.num_slots
        )
        self._runs_ahead = (
            self.runner.cached.device.type == "cuda" if runs_ahead is None else runs_ahead
        )
        self._leaving: list[tuple[Progress, bool]] = []
        """Ended requests that keep their slots until no tick is under way, and whether their logits were
        finite."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is open, no event is pending, and no tick is under way."""
        return not (self._open or self._pending or self.runner.num_started)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a prompt and its continuation."""
        return self.caches.settings.max_length

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running) - len(self._leaving)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def submit(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            ValueError: the request can never be served: it is too long, contains token ids outside
                the vocabulary, or has stop strings although the engine has no `decode`.
        """
        if len(request.ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"{len(request.ids)} prompt tokens plus max_new_tokens={request.max_new_tokens} "
                f"exceed max_length={self.max_length}. Ask for fewer tokens."
            )
        if not all(0 <= i < self.vocab_size for i in request.ids):
            raise ValueError(f"ids must be in 0..{self.vocab_size - 1}, the model's vocabulary.")
        if not all(0 <= i < self.vocab_size for i, _ in request.sampling.logit_bias):
            raise ValueError(
                f"logit_bias has token ids outside of 0..{self.vocab_size - 1}, the model's vocabulary."
            )
        if (request.num_logprobs or 0) > self.vocab_size:
            raise ValueError(
                f"num_logprobs={request.num_logprobs} exceeds the vocabulary of {self.vocab_size}."
            )
        if request.stop and self.decode is None:
            raise ValueError("stop strings need an engine with `decode`. Pass it, or use stop_ids.")
        progress = self.scheduler.submit(request)
        progress.may_continue = self._chooses_in_graph and _may_continue(request)
        self._open[progress.number] = progress
        self._prompt_logprobs[progress.number] = []
        if self.decode is not None:
            self._texts[progress.number] = TextStream(self.decode, request.stop)
        return progress.number

    def cancel(self, number: int) -> bool:
        """Cancel a request. Its last event is returned by the next `step`.

        Returns:
            False if the request has already ended.
        """
        progress = self._open.get(number)
        if progress is None:
            return False
        self._pending.append(self._finish(progress, "cancelled"))
        return True

    def stream(self, request: Request) -> Iterator[Event]:
        """Submit a request and run until it has ended. Events of other requests are discarded."""
        number = self.submit(request)
        return self._follow(number)

    def step(self) -> list[Event]:
        """Run one tick: every token in flight runs the block once.

        Returns:
            The events of this tick, in order, with at most one new token per request; those of the
            tick before if ticks run ahead.
        """
        self.prefixes.begin_tick()
        has_finished = self.runner.num_started > 0 and not self._can_run_ahead()
        if has_finished:
            self._finish_tick()
        if not self.runner.num_started:
            self._let_come_and_go()
        if self._open or not has_finished:
            self._start_tick()
        if not has_finished and self.runner.num_started > self._num_unread:
            self._finish_tick()
        pending, self._pending = self._pending, []
        return pending

    def run(self) -> Iterator[Event]:
        """Run until every request has ended, and yield all events."""
        while not self.is_idle:
            yield from self.step()

    def _follow(self, number: int) -> Iterator[Event]:
        try:
            while number in self._open or self._pending:
                for event in self.step():
                    if event.number == number:
                        yield event
        finally:  # the caller may abandon the iterator early
            self.cancel(number)

    def _can_run_ahead(self) -> bool:
        """Whether the next tick can start although the last one has not finished.

        Only tokens may enter then. Requests come, go and give way when no tick is under way.
        """
        if self._leaving or self.prefixes.readers or not self._num_unread:
            return False
        if self.scheduler.has_changes(self.caches.pages_free, self.prefixes.pages_borrowed):
            return False
        return self.runner.can_start(self.scheduler.num_ready)

    @property
    def _num_unread(self) -> int:
        """Number of ticks that may be under way when `step` returns."""
        running = self.scheduler.running.values()
        return int(self._runs_ahead and bool(self._open) and all(p.may_continue for p in running))

    def _let_come_and_go(self) -> None:
        """Give up the slots of requests that have ended, and give slots to others."""
        for progress, is_finite in self._leaving:
            self._vacate(progress, is_finite)
        self._leaving.clear()
        for progress in self.scheduler.overdue():
            self._pending.append(self._finish(progress, "timeout"))
        self._admit()

    def _start_tick(self) -> None:
        spans = self.scheduler.plan(self._share_prefixes(), self.runner.num_following)
        self.prefixes.begin([span.slot for span in spans])
        self.runner.start(spans, self._make_room)
        self.counters.ticks += 1

    def _finish_tick(self) -> None:
        """Wait for the first tick that is under way, and note its events."""
        finished = self.runner.finish(self._make_room)
        events = self._generated(finished)
        self._pending += events

    def _admit(self) -> None:
        """Give slots to waiting requests. Preempt clients that use more than their share."""
        self._admit_waiting()
        while (progress := self.scheduler.unfair()) is not None:
            self.runner.drop(self._preempt(progress))
            self._admit_waiting()

    def _admit_waiting(self) -> None:
        borrowed = self.prefixes.pages_borrowed
        for progress in self.scheduler.admit(self.caches.pages_free, borrowed):
            if progress.shares_prefix and not progress.request.prompt_logprobs:
                assert progress.slot is not None
                self.prefixes.open(
                    progress.slot,
                    progress.tokens,
                    progress.depths,
                    progress.request.client,
                    progress.request.cache_salt,
                )

    def _share_prefixes(self) -> set[int]:
        """Take cached prefixes instead of computing them.

        Returns:
            The slots of sequences that wait for a prefix that another one computes.
        """
        if not self.prefixes.readers:
            return set()
        running = self.scheduler.running
        found, held = self.prefixes.share(
            sorted(self.prefixes.readers, key=lambda slot: running[slot].number)
        )
        for slot, depths in found.items():
            self.scheduler.share(running[slot], depths)
            self.counters.cached_tokens += len(depths)
        return held

    def _make_room(self) -> int:
        """Take a sequence out to free its pages, and return its slot.

        The sequence is preempted and runs again later. If it is the only one, waiting would not
        free any pages, so its request ends with the reason "memory". Before that, a sequence that
        shares a prefix runs again without, because it may occupy fewer pages alone.
        """
        progress = self.scheduler.last()
        if progress is not None:
            return self._preempt(progress)
        ((slot, progress),) = self.scheduler.running.items()
        if self.prefixes.is_borrower(slot):
            progress.shares_prefix = False
            return self._preempt(progress)
        self._pending.append(self._finish(progress, "memory", drop=False))
        return slot

    def _preempt(self, progress: Progress) -> int:
        """Put a sequence back into the queue. Returns its slot, which the caller must drop."""
        slot = progress.slot
        assert slot is not None
        self.scheduler.preempt(progress)
        self.counters.preemptions += 1
        return slot

    def _generated(self, finished: Finished) -> list[Event]:
        known, unknown, rows, num_rows = [], [], [], 0
        for entry in finished.spans:
            progress, row = self.scheduler.running[entry.span.slot], num_rows
            num_rows += entry.needs_token
            if progress.number not in self._open:  # it ended while the tick was under way
                continue
            progress.in_flight = 0
            progress.depths += entry.depths
            self.counters.steps += sum(entry.depths)
            if entry.span.start < len(progress.request.ids):
                self.counters.prompt_tokens += len(entry.depths)
            if entry.logits is not None:
                self._note_prompt_logprobs(progress, entry)
            if entry.chosen is not None:
                known.append((progress, entry.depths[-1], entry.chosen.token))
                progress.in_flight = int(entry.chosen.goes_on)
                progress.num_started += progress.in_flight
            elif entry.needs_token:
                unknown.append((progress, entry.depths[-1]))
                rows.append(row)
        if not self.runner.num_started:
            self.prefixes.store()
        events = [self._advance(*own) for own in known]
        if unknown:
            logits = finished.logits if len(rows) == num_rows else finished.logits[rows]
            events += self._sampled(unknown, logits)
        return events

    def _note_prompt_logprobs(self, progress: Progress, entry: FinishedSpan) -> None:
        """Store the log-probabilities of the prompt tokens that follow those of a span."""
        assert entry.logits is not None and progress.request.num_logprobs is not None
        start, ids = entry.span.start, progress.request.ids
        following = ids[start + 1 : start + 1 + len(entry.depths)]
        counts = [progress.request.num_logprobs] * len(following)
        found = logprobs_of(entry.logits[: len(following)], following, counts)
        self._prompt_logprobs[progress.number][start:] = found

    def _sampled(self, done: list[tuple[Progress, int]], logits: Tensor) -> list[Event]:
        """Choose the next token of each sequence from its row of the logits.

        Args:
            done: the sequences, and the depth of the last token of each.
        """
        progresses = [progress for progress, _ in done]
        settings = [progress.request.sampling for progress in progresses]
        texts = [progress.tokens for progress in progresses]
        prompt_lengths = [len(progress.request.ids) for progress in progresses]
        scores = adjusted(logits, settings, texts, prompt_lengths)
        constraints = [progress.request.constraint for progress in progresses]
        scores, problems = constrained(scores, constraints)
        # Logits that do not define a distribution end their own request only. The sampler gets
        # zeros in their place, so that the other requests of the batch are not affected.
        is_defined = has_distribution(scores)
        scores = scores.where(is_defined[:, None], 0.0)
        picked = self.sampler(scores, settings, [progress.num_generated for progress in progresses])
        tokens = picked.where(
            is_defined, -1
        ).tolist()  # without logprobs, the only wait for the device
        logprobs = self._logprobs(progresses, tokens, logits)
        return [
            self._advance(progress, depth, tokens[row], logprobs.get(row))
            if tokens[row] >= 0
            else self._finish(progress, "error", error=problems.get(row, NOT_FINITE))
            for row, (progress, depth) in enumerate(done)
        ]

    @staticmethod
    def _logprobs(
        progresses: list[Progress], tokens: list[int], logits: Tensor
    ) -> dict[int, Logprobs]:
        """By row: the log-probabilities of the chosen tokens whose requests ask for them."""
        counts = {
            row: progress.request.num_logprobs
            for row, progress in enumerate(progresses)
            if progress.request.num_logprobs is not None and tokens[row] >= 0
        }
        if not counts:
            return {}
        rows = list(counts)
        found = logprobs_of(logits[rows], [tokens[row] for row in rows], list(counts.values()))
        return dict(zip(rows, found, strict=True))

    def _advance(
        self, progress: Progress, depth: int, token: int, logprobs: Logprobs | None = None
    ) -> Event:
        """Add a token to a sequence."""
        progress.tokens.append(token)
        self.counters.generated_tokens += 1
        request, number = progress.request, progress.number
        reason: FinishReason | None = None
        text, is_complete = "", token in request.stop_ids
        if request.constraint is not None:
            try:
                is_complete |= request.constraint.accept(token)
            except Exception as raised:  # raised by the grammar of this request
                return self._finish(progress, "error", error=str(raised))
        if self.decode is not None and token not in request.stop_ids:
            try:
                text, met_stop = self._texts[number].push(token)
            except Exception as raised:  # raised by the tokenizer for this text
                return self._finish(progress, "error", error=_undecodable(raised))
            is_complete |= met_stop
        if is_complete:
            reason = "stop"
        elif progress.num_generated == request.max_new_tokens:
            reason = "length"
        event = Event(number, token, depth, text=text, logprobs=logprobs)
        if progress.num_generated == 1:
            event = replace(
                event,
                prompt_depths=tuple(progress.depths[: len(request.ids)]),
                cached_tokens=progress.num_shared,
                prompt_logprobs=tuple(self._prompt_logprobs[number]),
            )
        if reason is None:
            return event
        end = self._finish(progress, reason)
        return replace(
            event, text=text + end.text, finish_reason=end.finish_reason, error=end.error
        )

    def _finish(
        self, progress: Progress, reason: FinishReason, drop: bool = True, error: str = ""
    ) -> Event:
        is_finite = error != NOT_FINITE
        if self.runner.num_started and progress.slot is not None:
            self._leaving.append((progress, is_finite))
        else:
            self._vacate(progress, is_finite, drop)
        del self._open[progress.number], self._prompt_logprobs[progress.number]
        stream = self._texts.pop(progress.number, None)
        self.counters.finished += 1
        text = ""
        if stream is not None and reason != "error":
            try:
                text = stream.rest()
            except Exception as raised:  # raised by the tokenizer for this text
                reason, error = "error", _undecodable(raised)
        return Event(progress.number, text=text, finish_reason=reason, error=error)

    def _vacate(self, progress: Progress, is_finite: bool, drop: bool = True) -> None:
        """Give up the slot of a request that has ended, or its place in the queue."""
        slot = progress.slot
        self.scheduler.leave(progress)
        if slot is not None and not is_finite:
            self.prefixes.forget(slot)
        if slot is not None and drop:
            self.runner.drop(slot)


def _may_continue(request: Request) -> bool:
    """Whether a graph can choose the tokens of a request."""
    needs_host = request.constraint is not None or request.num_logprobs is not None
    is_simple = not (needs_host or request.sampling.adjusts_logits)
    return is_simple and len(request.stop_ids) <= NUM_STOP_IDS


def _undecodable(raised: Exception) -> str:
    return f"the tokens could not be decoded: {type(raised).__name__}: {raised}"
