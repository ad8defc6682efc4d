"""Who runs next: requests, slots, spans and page budgets. Knows nothing about layers or tensors.

A request waits, is admitted to a slot, is computed span by span, and is finished. A span is a run of
its tokens that go through the model together: a chunk of the prompt, or the token generated last. One
span of a request is in flight at a time, so that every token finds the keys of all earlier ones.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mor_layers.generation.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "timeout", "memory", "error"]

PATIENCE = 1.0
"""Seconds that a client waits before others, who run more than their share, give way. Most places
come free sooner, and what gives way must be computed again."""


@dataclass(frozen=True)
class Request:
    """A text to continue."""

    ids: tuple[int, ...]
    """Token ids of the prompt. At least one."""
    max_new_tokens: int
    """Tokens to generate at most. At least 1."""
    sampling: Sampling = field(default_factory=Sampling)
    """How to pick tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; the one met is reported."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the one met is not part of it. Needs an engine that decodes."""
    timeout: float | None = None
    """Seconds from submission after which the request is given up. None: never."""
    client: str = ""
    """Who asks. Clients share the engine evenly, however many requests each of them sends."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids is empty. Give a prompt of at least one token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be above 0, or None.")
        if not all(self.stop):
            raise ValueError(f"stop={self.stop} has an empty string, which would end every text.")

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation whose keys are kept: the last one's never are."""
        return len(self.ids) + self.max_new_tokens - 1


@dataclass
class Progress:
    """How far a request is."""

    number: int
    """Its name, in order of submission."""
    request: Request
    tokens: list[int]
    """Prompt and what was generated up to now."""
    submitted: float
    """When, in seconds of the scheduler's clock."""
    deadline: float | None
    slot: int | None = None
    """Where it runs; None while it waits."""
    num_started: int = 0
    """Tokens that are computed or in flight."""
    in_flight: int = 0
    """Length of the span in flight."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.ids)

    @property
    def num_left(self) -> int:
        """Tokens known but not yet started."""
        return len(self.tokens) - self.num_started


@dataclass(frozen=True)
class Span:
    """Tokens of a request that enter the model together."""

    slot: int
    start: int
    """Position of the first."""
    ids: list[int]
    is_last: bool
    """Whether all known tokens are in then, so that the next one can be picked."""


class Scheduler:
    """Clients share evenly, and each is served in order, within slots and budgets of pages.

    Args:
        num_slots: requests that may run at a time.
        budgets: pages there are, of each kind.
        demand: pages of each kind that a sequence of a given length is expected to take.
        chunk_size: longest span.
        tokens_per_tick: tokens that may enter the model in one tick.
        clock: seconds, for timeouts.
    """

    def __init__(
        self,
        num_slots: int,
        budgets: tuple[int, ...],
        demand: Callable[[int], tuple[int, ...]],
        chunk_size: int,
        tokens_per_tick: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budgets, self.demand = budgets, demand
        self.chunk_size, self.tokens_per_tick = chunk_size, tokens_per_tick
        self.clock = clock
        self.waiting: list[Progress] = []
        self.running: dict[int, Progress] = {}
        self._free_slots = list(range(num_slots))[::-1]
        self._promised = [0] * len(budgets)
        self._submitted = 0

    def submit(self, request: Request) -> Progress:
        """Queue a request.

        Raises:
            ValueError: it could not run even alone.
        """
        demand = self.demand(request.max_length)
        if any(need > budget for need, budget in zip(demand, self.budgets, strict=True)):
            raise ValueError(
                f"a sequence of {request.max_length} tokens is expected to take {demand} pages of "
                f"the cache, which has {self.budgets}. Ask for fewer tokens, or give the engine "
                "a larger kv_bytes."
            )
        now = self.clock()
        deadline = None if request.timeout is None else now + request.timeout
        progress = Progress(self._submitted, request, list(request.ids), now, deadline)
        self._submitted += 1
        self.waiting.append(progress)
        return progress

    def overdue(self) -> list[Progress]:
        """Requests whose time is up."""
        now = self.clock()
        everyone = (*self.waiting, *self.running.values())
        return [p for p in everyone if p.deadline is not None and now >= p.deadline]

    def admit(self, free: tuple[int, ...]) -> None:
        """Give slots to those who come next, as long as what they are expected to take fits.

        The client that runs least comes next, with the request that it sent first. Nobody overtakes
        a request that does not fit, or a long one might wait for ever. Where nothing runs, the next
        one is admitted whatever it takes.

        Args:
            free: pages of each kind that are free now, which a new sequence must not exceed with
                what is known of it: others may have taken more than expected.
        """
        while self.waiting and self._free_slots:
            progress = self._next()
            demand = self.demand(progress.request.max_length)
            wanted = [p + d for p, d in zip(self._promised, demand, strict=True)]
            known = self.demand(len(progress.tokens))
            free = tuple(f - k for f, k in zip(free, known, strict=True))
            exceeds = any(w > b for w, b in zip(wanted, self.budgets, strict=True))
            if self.running and (exceeds or min(free) < 0):
                return
            self.waiting.remove(progress)
            progress.slot = self._free_slots.pop()
            progress.num_started = progress.in_flight = 0
            self.running[progress.slot] = progress
            self._promised = wanted

    def plan(self) -> list[Span]:
        """The spans that enter the model now: generated tokens first, then chunks of prompts."""
        idle = [p for p in self.running.values() if not p.in_flight and p.num_left]
        idle.sort(key=lambda p: (p.num_left > 1, p.number))
        spans, room = [], self.tokens_per_tick
        for progress in idle:
            length = min(progress.num_left, self.chunk_size, room)
            if length == 0:
                break
            start, room = progress.num_started, room - length
            progress.num_started += length
            progress.in_flight = length
            assert progress.slot is not None
            ids = progress.tokens[start : start + length]
            spans.append(Span(progress.slot, start, ids, not progress.num_left))
        return spans

    def last(self) -> Progress | None:
        """Who gives way when pages run out; None where at most one request runs.

        It is the youngest request of the client that runs most, so the oldest of all never is.
        """
        if len(self.running) < 2:
            return None
        running = self._running_by_client()
        return max(self.running.values(), key=lambda p: (running[p.request.client], p.number))

    def unfair(self) -> Progress | None:
        """Who gives way to a client that has waited for longer than `PATIENCE`; None where nobody.

        To be asked after `admit`. Only a client that still runs as much as the other afterwards
        gives way, so that the two never push each other out in turn.
        """
        progress, waiting = self.last(), self._next() if self.waiting else None
        if progress is None or waiting is None:
            return None
        running = self._running_by_client()
        surplus = running[progress.request.client] - running[waiting.request.client]
        has_waited = self.clock() - waiting.submitted >= PATIENCE
        return progress if surplus >= 2 and has_waited else None

    def leave(self, progress: Progress) -> None:
        """Take a request out, finished or given up. Its pages are the caller's to free."""
        if progress.slot is None:
            self.waiting.remove(progress)
            return
        del self.running[progress.slot]
        demand = self.demand(progress.request.max_length)
        self._promised = [p - d for p, d in zip(self._promised, demand, strict=True)]
        self._free_slots.append(progress.slot)
        progress.slot = None

    def preempt(self, progress: Progress) -> None:
        """Back to those who wait, to be computed again from what is known. Its number keeps it
        before all that its client sent later."""
        self.leave(progress)
        self.waiting.append(progress)

    def _next(self) -> Progress:
        running = self._running_by_client()
        return min(self.waiting, key=lambda p: (running[p.request.client], p.number))

    def _running_by_client(self) -> Counter[str]:
        return Counter(progress.request.client for progress in self.running.values())
