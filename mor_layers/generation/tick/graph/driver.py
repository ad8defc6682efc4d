"""StaticTick: the host's part of a tick that is one graph.

`start` chooses sizes, copies what enters to the device in one tensor, and runs the graph. `finish` reads
one small tensor, the report. A tick may start before the report of the last one has been read. The
device knows which tokens stay in flight and which follow; the host then makes room for all that may. It
always makes sure that there are free pages for the worst case. How many sequences will leave, it guesses
from the ticks before.

Legend: `t` rows, `h` hidden, `v` vocabulary.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_layers.generation.products import PackedProducts
from mor_layers.generation.scheduling import Span
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.generation.tick.graph.attention import Gathered
from mor_layers.generation.tick.graph.choosing import on_device
from mor_layers.generation.tick.graph.compiling import Backend, Compiled, obstacle
from mor_layers.generation.tick.graph.products import PackedInGraph
from mor_layers.generation.tick.graph.replay import Replay
from mor_layers.generation.tick.graph.report import LeftTick, Started
from mor_layers.generation.tick.graph.routing import StaticRouting
from mor_layers.generation.tick.graph.rows import StaticRows
from mor_layers.generation.tick.graph.sizes import FEWEST, padded_size
from mor_layers.generation.tick.graph.tick import Room, Ticked, TickGraph
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.generation.tick.span_exits import SpanExits
from mor_layers.generation.watched import WatchedParameters


class StaticTick:
    """Ticks of a model as one compiled graph, with the tokens that are in flight.

    Args:
        cached: the model with its caches, which have a spare slot.
        exits: where the states of exited tokens are kept until their span leaves.
        backend: of `torch.compile`.
        reads_out: whether the tick computes logits.
        reads_in_place: whether attention reads the cache in place. Default: on CPUs.

    Raises:
        ValueError: the model routes no tokens, or its layers cannot be compiled.
    """

    def __init__(
        self,
        cached: CachedModel,
        exits: SpanExits,
        backend: Backend,
        reads_out: bool = True,
        reads_in_place: bool | None = None,
    ) -> None:
        if not cached.is_pooled:
            raise ValueError(
                "the compiler is for a recursion that routes tokens, and this model has none. Use "
                "compiler=None."
            )
        if (problem := obstacle(cached.model)) is not None:
            raise ValueError(f"a tick cannot be compiled: {problem}. Use compiler=None.")
        self.cached, self.exits = cached, exits
        self.has_few_sizes = cached.device.type == "cuda"
        """Whether sizes are few, because each combination is recorded."""
        weight = cached.model.embedding.weight.detach()
        self.routing = StaticRouting(cached.blocks[0], weight[:1], cached.settings.max_length)
        if reads_in_place is None:
            reads_in_place = cached.device.type == "cpu"
        products = cached.products
        in_graph = None  # a compiler makes its own products of the model's weights
        if isinstance(products, PackedProducts) and cached.device.type == "cpu":
            in_graph = PackedInGraph(products, cached.model)
        self.graph = TickGraph(cached, self.routing, exits, reads_in_place, reads_out, in_graph)
        self._run = Compiled(self.graph, backend, _rows)
        self._replay = None
        if cached.device.type == "cuda":
            self._replay = Replay(self._run, self._without_effect)
        self._parameters = WatchedParameters(cached.model)
        self._nothing = torch.zeros(padded_size(0, self.has_few_sizes), 0, device=cached.device)
        self._rows: StaticRows | None = None
        self._is_through: Tensor | None = None
        self._pages = cached.outer_pages, cached.policy.pages
        self._nobody = self.graph.nowhere[[1, 0, 1, 1]]
        """Id, slot, position and place in a row that no token enters in, `[4 1]`."""
        self._following = self._nobody[:, :0]
        self._follows: set[int] = set()
        self._num_running = 0
        self._started: deque[Started] = deque()
        self._usual: float | None = None
        """Number of sequences that leave in a tick, averaged over the last ones."""

    @property
    def num_recorded(self) -> int:
        """Number of CUDA graphs recorded so far; 0 on a CPU."""
        return 0 if self._replay is None else self._replay.num_recorded

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens in flight are here, and not in a `Pool`."""
        return self._rows is not None

    @property
    def num_started(self) -> int:
        """Ticks that have started, and whose reports have not been read."""
        return len(self._started)

    @property
    def num_following(self) -> int:
        """Tokens that enter the next tick without the host, at most; exact if no tick is under way."""
        return self.graph.choosing.num_continuing if self._started else len(self._follows)

    def fits(self, num_entering: int, num_elsewhere: int) -> bool:
        """Whether a tick can run as a graph: pages suffice in any case, and rows are not too many.

        Args:
            num_entering: tokens that enter.
            num_elsewhere: tokens in flight that are not here yet, see `take`.
        """
        assert not self._started, "ask `fits_ahead` while a tick is under way"
        num_entering += len(self._follows)
        rows = self._num_running + num_elsewhere + num_entering
        if self._are_too_many(rows):
            return False
        unstored = num_entering + sum(len(rows) for rows in self.cached.unstored)
        most = rows + (unstored if self.cached.policy.keeps_exited else 0)
        outer, inner = self.cached.outer_pages, self.cached.policy.pages
        return inner.reserve(most) and (not outer.num_pages or outer.reserve(num_entering))

    def fits_ahead(self, num_in_flight: int) -> bool:
        """Whether a further tick can start before the reports of those under way have been read.

        Args:
            num_in_flight: tokens in flight, with those that enter.
        """
        if self._rows is None or self._are_too_many(num_in_flight):
            return False
        most = sum(own.most_rows for own in self._started) + self._most_rows(num_in_flight)
        outer, inner = self.cached.outer_pages, self.cached.policy.pages
        return inner.has_free(most) and (not outer.num_pages or outer.has_free(most))

    def _are_too_many(self, rows: int) -> bool:
        # A graph copies for each token of a chunk what they could share, unless it reads in place.
        return self.has_few_sizes and rows > 2 * self.cached.settings.num_slots

    def _most_rows(self, num_in_flight: int) -> int:
        """Rows of each kind that a tick of so many tokens writes to the cache, at most."""
        # Besides its own row, that of a token which exited in the last tick, or exits at once.
        return num_in_flight * (3 if self.cached.policy.keeps_exited else 1)

    def take(self, pool: Pool) -> None:
        """Continue with tokens that are about to run their next step."""
        rows = StaticRows.from_pool(pool, self.routing)
        missing = max(0, padded_size(len(pool), self.has_few_sizes) - len(pool))
        self._rows, self._num_running = rows.padded(missing, self.graph.nowhere), len(pool)
        self._is_through = torch.zeros_like(self.exits.left, dtype=torch.bool)

    def give(self) -> tuple[Pool, set[int]]:
        """Hand over the tokens that are about to run their next step, and the slots of those that would
        follow."""
        assert self._rows is not None and not self._started, "there are none here"
        pool, follows = self._rows.to_pool(self.routing), self._follows
        self._rows, self._is_through, self._num_running = None, None, 0
        self._following, self._follows = self._nobody[:, :0], set()
        return pool, follows

    def leave_to_host(self, slot: int) -> None:
        """Choose no further tokens of a sequence."""
        self.graph.choosing.forget(slot)

    def forget(self, slot: int) -> None:
        """Remove the tokens in flight of a sequence."""
        self._follows.discard(slot)
        if self._rows is not None and self._is_through is not None:
            self._rows = self._rows.without(slot)
            self._is_through[slot] = False
            is_other = self._following[1] != slot
            self._following = self._following.where(is_other, self._nobody)

    def note(self, spans: Sequence[Span]) -> None:
        """Take note of how sequences go on whose tokens enter, here or elsewhere."""
        self.graph.choosing.note(spans)

    def start(
        self, spans: Sequence[Span], hidden: Tensor | None, in_flight: dict[int, Span]
    ) -> None:
        """Start a tick.

        Args:
            spans: spans that enter.
            hidden: states of their tokens, `[t h]`; None to embed them.
            in_flight: all spans in flight by slot, with these.
        """
        assert self._rows is not None, "take a pool first"
        if self.routing.refresh():
            self._run.forget()
            if self._replay is not None:
                self._replay.forget()
        self.cached.products.refresh()
        entering, given = self._entering(spans, hidden)
        are_alone = all(len(span.ids) == 1 for span in in_flight.values())
        for cache in (self.graph.prelude_cache, self.graph.block_cache, self.graph.coda_cache):
            cache.are_alone = are_alone
        for own in self._pages:
            own.begin_graph()
        if self._replay is not None and self._parameters.have_changed():
            self._replay.forget()
        run = self._run if self._replay is None else self._replay
        ticked = run(
            entering,
            given,
            self._unstored(),
            self._is_through,
            self._room(in_flight),
            self._rows.tensors,
        )
        self._rows, self._is_through = StaticRows(*ticked.rows), ticked.is_through
        self._following = ticked.following
        self._note_unstored(ticked)
        # Until the report says more, all may be running.
        self._num_running = sum(len(span.ids) for span in in_flight.values())
        most_rows = self._most_rows(self._num_running)
        self._started.append(Started(ticked, most_rows, is_recorded=self._replay is not None))

    def finish(self) -> LeftTick:
        """Wait for the first of the ticks under way."""
        left = self._started.popleft().read(self.graph.spare_slot)
        for own, num_free in zip(self._pages, left.num_free, strict=True):
            own.end_graph(num_free)
        count = len(left.slots)
        self._usual = count if self._usual is None else 0.9 * self._usual + 0.1 * count
        if not self._started:  # what is in flight now is known
            self._num_running = left.num_running
            self._follows = set(compress(left.slots, left.goes_on))
            self._following = self._following[:, : len(self._follows)]
            self._compact_unstored()
        return left

    def _entering(
        self, spans: Sequence[Span], hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens that enter, with those that follow: `TickGraph`'s arguments of these names."""
        ids = [i for span in spans for i in span.ids]
        count = len(ids) + self._following.shape[1]
        missing = padded_size(count, self.has_few_sizes) - count
        slots = [span.slot for span in spans for _ in span.ids]
        places = [place for span in spans for place in range(len(span.ids))]
        positions = [span.start + place for span in spans for place in range(len(span.ids))]
        rows = [ids, slots + [self.graph.spare_slot] * missing, positions, places]
        padded = [row + [0] * (len(ids) + missing - len(row)) for row in rows]
        new = on_device(padded, torch.long, self.cached.device)
        given = None if hidden is None else F.pad(hidden, (0, 0, 0, missing))
        return torch.cat([self._following, new], dim=1), given

    def _unstored(self) -> tuple[Tensor, Tensor] | None:
        """States and notes of the tokens whose states the policy stores now."""
        if not self.cached.policy.keeps_exited:
            return None
        unstored, self.cached.unstored = self.cached.unstored, []
        if not unstored:
            return self._padding(0)
        rows = Rows.joined(unstored)
        hidden, notes = self._padding(len(rows))
        return torch.cat([rows.hidden, hidden]), torch.cat([rows.notes, notes], dim=1)

    def _padding(self, count: int) -> tuple[Tensor, Tensor]:
        """States and notes of rows without a token that complete so many."""
        missing = padded_size(count, self.has_few_sizes) - count
        hidden = self.cached.model.embedding.weight
        return hidden.new_zeros(missing, hidden.shape[1]), self.graph.nowhere.repeat(1, missing)

    def _note_unstored(self, ticked: Ticked) -> None:
        """Note the states of exited tokens, among rows that hold none."""
        if self.cached.policy.keeps_exited:
            notes = torch.where(ticked.is_unstored, ticked.rows[1], self.graph.nowhere)
            self.cached.unstored.append(Rows(ticked.exited, notes))

    def _compact_unstored(self) -> None:
        """Leave out the rows that hold no token."""
        unstored, self.cached.unstored = self.cached.unstored, []
        for rows in unstored:
            index = (rows.slots != self.graph.spare_slot).nonzero()[:, 0]
            if len(index):
                self.cached.unstored.append(rows.take(index))

    def _room(self, in_flight: dict[int, Span]) -> Room:
        leaving = len(in_flight)
        if self._usual is not None:  # one standard deviation more than usual, if it were Poisson's
            leaving = min(leaving, math.ceil(self._usual + math.sqrt(self._usual)))
        longest = 0
        if isinstance(self.graph.block_cache, Gathered):
            ends = (span.start + len(span.ids) for span in in_flight.values())
            longest = max(ends, default=0) + len(self._started)  # a token may have followed
        few = self.has_few_sizes
        leaving = padded_size(leaving, few)
        counts = self.graph.choosing.counts
        ways = (FEWEST + min(padded_size(n, few), leaving) if n else FEWEST for n in counts)
        new = self._nothing.new_zeros
        return Room(
            waiting=new(padded_size(self._num_running, few), 0),
            leaving=new(leaving, 0),
            seen=new(padded_size(longest, few), 0),
            ways=new(*ways, 0),
        )

    def _without_effect(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of the same shapes, in which no row holds a token."""
        entering, given, unstored, is_through, room, waiting = arguments
        nowhere = self.graph.nowhere
        if unstored is not None:
            unstored = unstored[0], nowhere.expand_as(unstored[1])
        rows = StaticRows(*waiting)
        blank = replace(
            rows, notes=nowhere.expand_as(rows.notes), is_running=torch.zeros_like(rows.is_running)
        )
        return (
            self._nobody.expand_as(entering),
            given,
            unstored,
            torch.zeros_like(is_through),
            room,
            blank.tensors,
        )


def _rows(
    entering: Tensor,
    given: Tensor | None,
    unstored: tuple[Tensor, Tensor] | None,
    is_through: Tensor,
    room: Room,
    waiting: tuple[Tensor, ...],
) -> list[tuple[Tensor, int]]:
    """The arguments of `TickGraph` that have rows, and the dimension of these."""
    hidden, notes, *rest = waiting
    first, second = [*room, hidden, *rest], [room.ways, entering, notes]
    if given is not None:
        first.append(given)
    if unstored is not None:
        first.append(unstored[0])
        second.append(unstored[1])
    dimensions = [(tensor, 0) for tensor in first] + [(tensor, 1) for tensor in second]
    return [*dimensions, (room.ways, 2)]
