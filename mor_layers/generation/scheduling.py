"""Scheduler: decides which request runs next. It knows nothing about layers or tensors.

A request waits, is admitted to a slot, is computed span by span, and finishes. A span is a run of
consecutive tokens that enter the model together: a chunk of the prompt, or the last generated token.
Each request has at most one span in flight, so that the keys of all earlier tokens are in the cache
when a token needs them.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

from mor_layers.generation.sampling import Constraint, Sampling

FinishReason = Literal["stop", "length", "cancelled", "timeout", "memory", "error"]

PATIENCE = 1.0
"""Seconds that a client waits before a request of a client with more than its share is preempted.

Preemption is the last resort, because the preempted request must be recomputed. Most slots become
free sooner."""

TURN = 128
"""Tokens that a request of a named client may generate before it must give its slot to one that has
waited for `PATIENCE` seconds. Long answers therefore cannot hold up a short one, whoever sent them.

A turn is never shorter than what the slot's owner had to compute to begin it. Recomputation therefore
at most doubles the number of tokens that are computed, and every turn makes progress."""


@dataclass(frozen=True)
class Request:
    """A text to continue."""

    ids: tuple[int, ...]
    """Token ids of the prompt. At least one."""
    max_new_tokens: int
    """Largest number of tokens to generate. At least 1."""
    sampling: Sampling = field(default_factory=Sampling)
    """How to choose the next token."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text. The token that ended it is reported, but is not part of `Event.text`."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are removed from it. They need an engine with `decode`."""
    timeout: float | None = None
    """Seconds after submission at which the request ends unfinished. None: no timeout."""
    num_logprobs: int | None = None
    """Report the log-probability of every generated token, and so many of the most likely tokens at its
    place. None: report none."""
    prompt_logprobs: bool = False
    """Report the same for the tokens of the prompt. Needs `num_logprobs`."""
    constraint: Constraint | None = None
    """Which tokens may come next. It keeps the state of this text, so give each request its own."""
    priority: int = 0
    """Among the waiting requests of a client, the one with the lowest number comes next."""
    client: str = ""
    """The sender. Clients share the engine equally, regardless of their number of requests, and long
    requests take turns. If empty, requests are served in order, for the highest throughput."""
    cache_salt: str = ""
    """Only requests with the same salt share prefixes, see `CacheSettings.prefix_sharing`."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids is empty. Give a prompt of at least one token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be above 0, or None for no timeout.")
        if not all(self.stop):
            raise ValueError(f"stop={self.stop} has an empty string, which would end every text.")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise ValueError(
                f"num_logprobs={self.num_logprobs} must be 0 or more, or None for none."
            )
        if self.prompt_logprobs and self.num_logprobs is None:
            raise ValueError("prompt_logprobs=True needs num_logprobs. Set it, to 0 or more.")

    @property
    def max_length(self) -> int:
        """Number of tokens whose keys are stored at most. The last generated token is never run."""
        return len(self.ids) + self.max_new_tokens - 1


@dataclass(frozen=True)
class Continuation:
    """How a sequence goes on without the host: what chooses its next tokens, and when it ends."""

    sampling: Sampling
    num_generated: int
    """Number of tokens that it has generated."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass
class Progress:
    """The state of a request."""

    number: int
    """Identifies the request. Requests are numbered in order of submission."""
    request: Request
    tokens: list[int]
    """The prompt, and the tokens generated so far."""
    submitted: float
    """Time of submission, in seconds of the scheduler's clock."""
    deadline: float | None
    place: int
    """Its place among the waiting requests of its client. The lowest comes next."""
    queued: float
    """When it was last put into the queue, in seconds of the scheduler's clock."""
    num_known: int = 0
    """Number of tokens that were known when it got its slot."""
    slot: int | None = None
    """The slot that it runs in, or None while it waits."""
    num_started: int = 0
    """Number of tokens that are computed or in flight."""
    in_flight: int = 0
    """Length of the span in flight, or 0."""
    depths: list[int] = field(default_factory=list)
    """Number of steps that each token took, of those whose rows are in its slot."""
    num_shared: int = 0
    """How many of them were not computed, because another request had the same prefix."""
    shares_prefix: bool = True
    """Whether it may take part in the sharing of prefixes."""
    may_continue: bool = False
    """Whether it may go on without the host, see `Continuation`."""
    promised: tuple[int, ...] = ()
    """Number of pages of each kind that are expected for it while it runs."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.ids)

    @property
    def num_left(self) -> int:
        """Number of known tokens that have not entered the model yet."""
        return len(self.tokens) - self.num_started

    @property
    def continuation(self) -> Continuation | None:
        """How it goes on after its last known token without the host, if it may."""
        if not self.may_continue:
            return None
        request = self.request
        return Continuation(
            request.sampling, self.num_generated, request.max_new_tokens, request.stop_ids
        )

    @property
    def has_had_its_turn(self) -> bool:
        """Whether it has generated enough since it got its slot to give the slot to another one."""
        turn = max(TURN, self.num_known)
        return bool(self.request.client) and len(self.tokens) - self.num_known >= turn


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a request that enter the model together."""

    slot: int
    start: int
    """Position of the first token."""
    ids: list[int]
    is_last: bool
    """Whether the span ends with the last known token, so that its logits give the next one."""
    needs_all_logits: bool = False
    """Whether the logits of all its tokens are needed, not only those of the last one."""
    continuation: Continuation | None = None
    """How the sequence goes on after a single token that is its last known one; None: the host says."""

    def followed_by(self, token: int) -> "Span":
        """The span of the next token of a sequence that goes on without the host."""
        return Span(self.slot, self.start + 1, [token], True, False, self.continuation)


class Scheduler:
    """Assigns slots and pages to requests. Clients get equal shares of the slots.

    Args:
        num_slots: largest number of requests that run at the same time.
        budgets: number of pages of each kind.
        demand: returns the number of pages of each kind that a sequence of a given length is
            expected to need.
        chunk_size: largest number of tokens in a span.
        tokens_per_tick: largest number of tokens that enter the model in one tick.
        clock: returns the time in seconds. Used for timeouts.
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
        self._submitted = self._queued = 0

    def submit(self, request: Request) -> Progress:
        """Queue a request.

        Raises:
            ValueError: the request is expected to need more pages than there are.
        """
        demand = self.demand(request.max_length)
        if any(need > budget for need, budget in zip(demand, self.budgets, strict=True)):
            raise ValueError(
                f"a sequence of {request.max_length} tokens is expected to need {demand} pages of "
                f"the cache, which has {self.budgets}. Ask for fewer tokens, or build the engine "
                "with a larger kv_bytes."
            )
        now = self.clock()
        deadline = None if request.timeout is None else now + request.timeout
        number, tokens = self._submitted, list(request.ids)
        progress = Progress(number, request, tokens, now, deadline, self._next_place(), now)
        progress.promised = (0,) * len(self.budgets)
        self._submitted += 1
        self.waiting.append(progress)
        return progress

    def overdue(self) -> list[Progress]:
        """Requests whose deadline has passed."""
        now = self.clock()
        everyone = (*self.waiting, *self.running.values())
        return [p for p in everyone if p.deadline is not None and now >= p.deadline]

    def admit(self, free: tuple[int, ...], borrowed: tuple[int, ...] = ()) -> list[Progress]:
        """Admit waiting requests to slots, as long as their expected demand of pages fits.

        The next request is the first one of the client with the fewest running requests. No
        request overtakes one that does not fit, or a long request might wait forever. If nothing
        runs, the next request is admitted regardless of its expected demand.

        Args:
            free: number of pages of each kind that are free now. The known tokens of a new sequence
                must fit into them, because running sequences may have used more than expected.
            borrowed: number of pages in use that running sequences share and nobody is promised.

        Returns:
            The admitted requests.
        """
        admitted = []
        while (progress := self._next_that_fits(free, borrowed)) is not None:
            known = self.demand(len(progress.tokens))
            free = tuple(f - k for f, k in zip(free, known, strict=True))
            self.waiting.remove(progress)
            progress.slot = self._free_slots.pop()
            progress.num_started = progress.in_flight = progress.num_shared = 0
            progress.depths = []
            progress.num_known = len(progress.tokens)
            self._promise(progress, self.demand(progress.request.max_length))
            self.running[progress.slot] = progress
            admitted.append(progress)
        return admitted

    def has_changes(self, free: tuple[int, ...], borrowed: tuple[int, ...] = ()) -> bool:
        """Whether a request may come, must end, or must give way now; arguments as for `admit`."""
        may_come = self._next_that_fits(free, borrowed) is not None
        return may_come or bool(self.overdue()) or self.unfair() is not None

    def share(self, progress: Progress, depths: list[int]) -> None:
        """Continue a request whose first or next tokens need not be computed.

        Args:
            depths: number of steps that each of these tokens took.
        """
        progress.depths += depths
        progress.num_started += len(depths)
        progress.num_shared += len(depths)
        self._promise(progress, self.demand(progress.request.max_length - progress.num_shared))

    def plan(self, held: Collection[int] = (), num_entering: int = 0) -> list[Span]:
        """Choose the spans that enter the model now: generated tokens first, then prompt chunks.

        Args:
            held: slots of sequences that do not continue now.
            num_entering: tokens that enter anyway.
        """
        idle = [
            p
            for p in self.running.values()
            if not p.in_flight and p.num_left and p.slot not in held
        ]
        idle.sort(key=lambda p: (p.num_left > 1, p.number))
        spans, room = [], self.tokens_per_tick - num_entering
        for progress in idle:
            length = min(progress.num_left, self.chunk_size, room)
            if length <= 0:
                break
            start, room = progress.num_started, room - length
            progress.num_started += length
            progress.in_flight = length
            assert progress.slot is not None
            ids, request = progress.tokens[start : start + length], progress.request
            needs_all = (
                request.prompt_logprobs
                and not progress.num_generated
                and start < len(request.ids) - 1
            )
            is_last = not progress.num_left
            continuation = progress.continuation if is_last and length == 1 else None
            spans.append(Span(progress.slot, start, ids, is_last, needs_all, continuation))
        return spans

    @property
    def num_ready(self) -> int:
        """Number of tokens that `plan` would choose, at most."""
        ready = (p.num_left for p in self.running.values() if not p.in_flight)
        return sum(min(count, self.chunk_size) for count in ready)

    def last(self) -> Progress | None:
        """The request to preempt when pages run out, or None if at most one request runs.

        This is the newest request of the client with the most running requests. The oldest running
        request is therefore never preempted and always finishes.
        """
        if len(self.running) < 2:
            return None
        running = self._running_by_client()
        return max(self.running.values(), key=lambda p: (running[p.request.client], p.number))

    def unfair(self) -> Progress | None:
        """The request to preempt for one that has waited longer than `PATIENCE`, or None.

        Call this after `admit`. The slot comes from the client that runs the most requests, if it
        still runs at least as many as the waiting client afterwards. Otherwise it comes from a
        request that has had its turn, of a client that runs no less than the waiting one. These
        conditions keep two requests from preempting each other without making progress.
        """
        now = self.clock()
        if all(now - p.queued < PATIENCE for p in self.waiting):  # the common case, in every tick
            return None
        progress, waiting = self.last(), self._next()
        if progress is None or now - waiting.queued < PATIENCE:
            return None
        running, client = self._running_by_client(), waiting.request.client
        if running[progress.request.client] - running[client] >= 2:
            return progress
        finished_turns = [
            p
            for p in self.running.values()
            if p.has_had_its_turn
            and running[p.request.client] >= running[client] + (p.request.client != client)
        ]
        return min(finished_turns, key=lambda p: p.place, default=None)

    def leave(self, progress: Progress) -> None:
        """Remove a finished or cancelled request. The caller must free its pages."""
        if progress.slot is None:
            self.waiting.remove(progress)
            return
        del self.running[progress.slot]
        self._promise(progress, (0,) * len(self.budgets))
        self._free_slots.append(progress.slot)
        progress.slot = None

    def preempt(self, progress: Progress) -> None:
        """Put a request back into the queue, to be recomputed from its known tokens.

        If it has had its turn, it goes to the end of its client's queue. Otherwise it keeps its
        place, so it runs before all requests that its client sent later.
        """
        self.leave(progress)
        progress.queued = self.clock()
        if progress.has_had_its_turn:
            progress.place = self._next_place()
        self.waiting.append(progress)

    def _next_that_fits(self, free: tuple[int, ...], borrowed: tuple[int, ...]) -> Progress | None:
        """The next request, if there are a slot and pages for it; see `admit`."""
        if not self.waiting or not self._free_slots:
            return None
        progress = self._next()
        if not self.running:
            return progress
        known = self.demand(len(progress.tokens))
        demand = self.demand(progress.request.max_length)
        wanted = [p + d for p, d in zip(self._promised, demand, strict=True)]
        budgets = [b - used for b, used in zip_longest(self.budgets, borrowed, fillvalue=0)]
        exceeds = any(w > b for w, b in zip(wanted, budgets, strict=True))
        return None if exceeds or any(k > f for k, f in zip(known, free, strict=True)) else progress

    def _promise(self, progress: Progress, demand: tuple[int, ...]) -> None:
        change = zip(self._promised, demand, progress.promised, strict=True)
        self._promised = [total + new - old for total, new, old in change]
        progress.promised = demand

    def _next(self) -> Progress:
        running = self._running_by_client()
        return min(
            self.waiting, key=lambda p: (running[p.request.client], p.request.priority, p.place)
        )

    def _next_place(self) -> int:
        self._queued += 1
        return self._queued

    def _running_by_client(self) -> Counter[str]:
        return Counter(progress.request.client for progress in self.running.values())
