"""Link: one recursion of a model, the layers around it, and the spans in flight there.

A tick runs operation by operation, in any case, or as one compiled graph (`graph`), if there are
free pages for the worst case. The tokens in flight go from one form to the other in between. A graph may
start before the host has read what the last one did.

Legend: `t` tokens in flight, `h` hidden, `v` vocabulary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.scheduling import Span
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.generation.tick.graph import NOT_CHOSEN, Backend, LeftTick, StaticTick
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.generation.tick.span_exits import SpanExits


@dataclass(frozen=True)
class Next:
    """The next token of a sequence, which a graph chose."""

    token: int
    goes_on: bool
    """Whether it enters the next tick without the host."""


@dataclass(frozen=True)
class Left:
    """Spans that have run all layers of a link."""

    spans: list[Span]
    """Those with `is_last` come first."""
    hidden: Float[Tensor, "t h"]
    """States of their tokens."""
    depths: list[int]
    """Number of steps that each token took."""
    logits: Float[Tensor, "t v"] | None = None
    """Logits of their tokens, if they have been computed."""
    chosen: dict[int, Next] = field(default_factory=dict)
    """By slot, the next tokens that a graph chose."""


class Link:
    """One recursion of the model, the layers around it, and the spans in flight there.

    Args:
        cached: the model with its caches.
        max_span: largest number of tokens in a span.
        compiler: backend of `torch.compile` for ticks as one graph; None: there are none.
        is_last: whether the logits are computed here.

    Raises:
        ValueError: the model cannot be compiled.
    """

    def __init__(
        self,
        cached: CachedModel,
        max_span: int,
        compiler: Backend | None = None,
        is_last: bool = True,
    ) -> None:
        self.cached = cached
        embedding, device = cached.model.embedding.weight, cached.device
        nowhere = torch.zeros(4, 0, dtype=torch.long, device=device)
        nobody = Rows.of(embedding.detach()[:0], *nowhere)
        self._waiting = Pool.at(0, cached.num_steps, nobody)  # for their next step
        self._through: list[Rows] = []  # tokens that exit in this tick
        self._spans: dict[int, Span] = {}
        # The last slot is spare: rows of a graph that hold no token are there.
        self._exits = SpanExits(cached.settings.num_slots + 1, max_span, embedding)
        self._held: set[int] = set()
        """Slots whose span does not leave inside a graph: `SpanExits.left` counts one token too many."""
        self._results: deque[Left | list[Span]] = deque()
        """Of the ticks that have started: what left, or for a graph the spans held when it started."""
        self.static: StaticTick | None = None
        if compiler is not None:
            self.static = StaticTick(cached, self._exits, compiler, is_last)

    @property
    def num_started(self) -> int:
        """Ticks that have started and not finished."""
        return len(self._results)

    @property
    def num_following(self) -> int:
        """Tokens that enter the next tick without being given to it, at most."""
        return 0 if self.static is None else self.static.num_following

    def can_start(self, num_entering: int) -> bool:
        """Whether a further tick can start although one has not finished."""
        if self.static is None or not self.static.num_started:
            return False
        in_flight = sum(len(span.ids) for span in self._spans.values())
        return self.static.fits_ahead(in_flight + num_entering)

    def tick(self, spans: list[Span], hidden: Tensor | None, make_room: Callable[[], int]) -> Left:
        """`start` and `finish`."""
        self.start(spans, hidden, make_room)
        return self.finish()

    def start(self, spans: list[Span], hidden: Tensor | None, make_room: Callable[[], int]) -> None:
        """Add spans, and run every token in flight once through the block.

        Args:
            hidden: states of the tokens of the spans, `[t h]`; None to embed them.
            make_room: called when pages run out. It removes a sequence, here too, and returns its slot.
        """
        if self._results:  # `can_start` has been asked
            assert self.static is not None
            self._start_graph(self.static, spans, hidden)
        elif not spans and not self._spans:
            self._results.append(self._leave([]))
        elif self.static is not None and self.static.fits(
            sum(len(span.ids) for span in spans), len(self._waiting)
        ):
            self._start_graph(self.static, spans, hidden)
        else:
            self._results.append(self._run(self._with_following(spans), hidden, make_room))

    def finish(self) -> Left:
        """Return the spans that are done in the first of the ticks that have started."""
        result = self._results.popleft()
        if isinstance(result, Left):
            return result
        assert self.static is not None
        return self._finish_graph(self.static.finish(), result)

    def forget(self, slot: int) -> None:
        """Remove the tokens in flight of a sequence."""
        if self.static is not None:
            self.static.leave_to_host(slot)
        if self._spans.pop(slot, None) is None:
            return
        self._held.discard(slot)
        self._exits.forget(slot)
        if self.static is not None:
            self.static.forget(slot)
        self._waiting = self._waiting.without(slot)
        self._through = [rows.without(slot) for rows in self._through]

    def _run(self, spans: list[Span], hidden: Tensor | None, make_room: Callable[[], int]) -> Left:
        """Run a tick operation by operation."""
        entering = self._route(self._enter(spans, hidden, make_room))
        pool = self._fit(self._waiting.behind(entering), make_room)
        self._waiting = self._route(self.cached.run(pool))
        self._note_exits()
        left = self._exits.left.tolist()
        return self._leave([span for span in self._spans.values() if self._is_done(span, left)])

    def _with_following(self, spans: list[Span]) -> list[Span]:
        """Take the tokens in flight from the graph. Those that would follow enter with the others."""
        if self.static is None:
            return spans
        self.static.note(spans)
        if not self.static.has_tokens:
            return spans
        self._waiting, following = self.static.give()
        return [*(self._spans[slot] for slot in following), *spans]

    def _start_graph(self, static: StaticTick, spans: list[Span], hidden: Tensor | None) -> None:
        if not static.has_tokens:
            static.take(self._waiting)
            self._waiting = self._waiting.take([])
        self._add(spans)
        static.note(spans)
        static.start(spans, hidden, self._spans)
        self._results.append([self._spans[slot] for slot in self._held])

    def _finish_graph(self, ticked: LeftTick, held: list[Span]) -> Left:
        spans, chosen = [self._spans[slot] for slot in ticked.slots], dict[int, Next]()
        for span, token, goes_on in zip(spans, ticked.tokens, ticked.goes_on, strict=True):
            if token != NOT_CHOSEN:
                chosen[span.slot] = Next(token, goes_on)
            if goes_on:
                self._spans[span.slot] = span.followed_by(token)
            else:
                del self._spans[span.slot]
        # The tokens of a span that is held now and was not when the tick started are not in the report.
        done = [
            span
            for span in held
            if self._spans.get(span.slot) is span and self._is_done(span, ticked.left)
        ]
        if not done and all(span.is_last for span in spans):
            return Left(spans, ticked.ended, ticked.depths, ticked.logits, chosen)
        return _joined(Left(spans, ticked.ended, ticked.depths, chosen=chosen), self._leave(done))

    def _add(self, spans: list[Span]) -> None:
        for span in spans:
            self._spans[span.slot] = span
            # A graph lets single tokens leave. The tokens of a chunk leave together, and may need more
            # logits than those of the last one.
            if self.static is not None and (len(span.ids) > 1 or span.needs_all_logits):
                self._held.add(span.slot)
                self._exits.left[span.slot] += 1

    def _enter(
        self, spans: list[Span], hidden: Tensor | None, make_room: Callable[[], int]
    ) -> Pool:
        """Run the layers before the recursion, and all others if it routes no tokens."""
        outer_pages = self.cached.outer_pages
        while True:
            slots, positions, places = self._places(spans)
            if not outer_pages.num_pages or outer_pages.fits(slots):
                break
            slot = make_room()
            spans = [span for span in spans if span.slot != slot]
            hidden = None if hidden is None else hidden[slots != slot]
        self._add(spans)
        self.cached.are_alone = all(len(span.ids) == 1 for span in self._spans.values())
        self._exits.expect(slots)
        if hidden is not None:
            return self.cached.begin_from(hidden, slots, positions, places)
        ids = torch.tensor([i for span in spans for i in span.ids], dtype=torch.long)
        return self.cached.begin(ids.to(self.cached.device), slots, positions, places)

    def _places(self, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, position in the text and place in the span of each token."""
        slots = [span.slot for span in spans for _ in span.ids]
        places = [place for span in spans for place in range(len(span.ids))]
        positions = [span.start + place for span in spans for place in range(len(span.ids))]
        tokens = torch.tensor([slots, positions, places], dtype=torch.long).to(self.cached.device)
        return tokens[0], tokens[1], tokens[2]

    def _route(self, pool: Pool) -> Pool:
        """Route the tokens. Return those that run their next step, and record those that exit."""
        pool, exiting = self.cached.route(pool)
        if exiting is not None:
            self._through.append(exiting)
        return pool

    def _note_exits(self) -> None:
        """Store the final states and depths of the tokens that exited in this tick, at any step."""
        if not self._through:
            return
        rows, self._through = Rows.joined(self._through), []
        self._exits.note(rows)

    def _fit(self, pool: Pool, make_room: Callable[[], int]) -> Pool:
        """Take out sequences until the cache has room for the tokens of all others."""
        while len(pool) and not self.cached.policy.fits(*self.cached.in_flight(pool)):
            pool = pool.without(make_room())
        return pool

    def _is_done(self, span: Span, left: list[int]) -> bool:
        """Whether the tokens of a span have all exited.

        Args:
            left: by slot, the number of tokens that have not.
        """
        return left[span.slot] == (span.slot in self._held)

    def _leave(self, spans: list[Span]) -> Left:
        """Run the layers after the recursion on spans whose tokens have all exited."""
        if not spans:
            return Left([], self._exits.hidden[0, :0], [])
        spans.sort(key=lambda span: not span.is_last)
        for span in spans:
            del self._spans[span.slot]
            if span.slot in self._held:
                self._held.remove(span.slot)
                self._exits.forget(span.slot)
        slots, positions, places = self._places(spans)
        hidden = self.cached.end(self._exits.hidden[slots, places], slots, positions)
        return Left(spans, hidden, self._exits.depths[slots, places].tolist())


def _joined(first: Left, second: Left) -> Left:
    """The spans of both."""
    spans = [*first.spans, *second.spans]
    ends = list(accumulate(len(span.ids) for span in spans))
    order = sorted(range(len(spans)), key=lambda i: not spans[i].is_last)
    rows = [row for i in order for row in range(ends[i] - len(spans[i].ids), ends[i])]
    hidden, depths = torch.cat([first.hidden, second.hidden]), first.depths + second.depths
    index = torch.tensor(rows, dtype=torch.long).to(hidden.device)
    return Left(
        [spans[i] for i in order],
        hidden[index],
        [depths[row] for row in rows],
        chosen=first.chosen | second.chosen,
    )
