"""StaticTick: the host's part of a tick that is one graph.

It chooses sizes, copies what enters to the device in one tensor, runs the graph, and reads one small
tensor. The host knows how many tokens enter and how many stay in flight; how many sequences will leave,
it guesses from the ticks before. It makes sure that there are free pages for the worst case.

Legend: `t` rows, `h` hidden, `v` vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.products import PackedProducts
from mor_layers.generation.scheduling import Span
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.generation.tick.graph.attention import Gathered
from mor_layers.generation.tick.graph.compiling import Backend, Compiled, obstacle
from mor_layers.generation.tick.graph.products import PackedInGraph
from mor_layers.generation.tick.graph.replay import Replay
from mor_layers.generation.tick.graph.routing import StaticRouting
from mor_layers.generation.tick.graph.rows import StaticRows
from mor_layers.generation.tick.graph.sizes import padded_size
from mor_layers.generation.tick.graph.tick import Room, Ticked, TickGraph
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.generation.tick.span_exits import SpanExits
from mor_layers.generation.watched import WatchedParameters


@dataclass(frozen=True)
class LeftTick:
    """What a tick that ran as a graph leaves to the host."""

    spans: list[Span]
    """Spans of one token that have run all layers."""
    ended: Float[Tensor, "t h"]
    """States of their tokens."""
    logits: Float[Tensor, "t v"] | None
    depths: list[int]
    left: list[int]
    """By slot, the number of tokens that have not exited yet; see `StaticTick.held`."""


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
        self._num_running = 0
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

    def fits(self, num_entering: int, num_elsewhere: int) -> bool:
        """Whether a tick can run as a graph: pages suffice in any case, and rows are not too many.

        Args:
            num_entering: tokens that enter.
            num_elsewhere: tokens in flight that are not here yet, see `take`.
        """
        rows = self._num_running + num_elsewhere + num_entering
        # A graph copies for each token of a chunk what they could share, unless it reads in place.
        if self.has_few_sizes and rows > 2 * self.cached.settings.num_slots:
            return False
        unstored = num_entering + sum(len(rows) for rows in self.cached.unstored)
        most = rows + (unstored if self.cached.policy.keeps_exited else 0)
        outer, inner = self.cached.outer_pages, self.cached.policy.pages
        return inner.reserve(most) and (not outer.num_pages or outer.reserve(num_entering))

    def take(self, pool: Pool) -> None:
        """Continue with tokens that are about to run their next step."""
        rows = StaticRows.from_pool(pool, self.routing)
        missing = max(0, padded_size(len(pool), self.has_few_sizes) - len(pool))
        self._rows, self._num_running = rows.padded(missing, self.graph.nowhere), len(pool)
        self._is_through = torch.zeros_like(self.exits.left, dtype=torch.bool)

    def give(self) -> Pool:
        """Hand over the tokens that are about to run their next step."""
        assert self._rows is not None, "there are none here"
        pool = self._rows.to_pool(self.routing)
        self._rows, self._is_through, self._num_running = None, None, 0
        return pool

    def forget(self, slot: int) -> None:
        """Remove the tokens in flight of a sequence."""
        if self._rows is not None and self._is_through is not None:
            self._rows = self._rows.without(slot)
            self._is_through[slot] = False

    def __call__(
        self, spans: Sequence[Span], hidden: Tensor | None, in_flight: dict[int, Span]
    ) -> LeftTick:
        """Run a tick.

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
        pages = self.cached.outer_pages, self.cached.policy.pages
        for own in pages:
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
        num_leaving = len(ticked.ended)
        (
            self._num_running,
            *free,
        ) = (report := ticked.report.tolist())[:3]
        for own, num_free in zip(pages, free, strict=True):
            own.end_graph(num_free)
        self._note_unstored(ticked)
        slots, depths = report[3 : 3 + num_leaving], report[3 + num_leaving : 3 + 2 * num_leaving]
        count = sum(slot != self.graph.spare_slot for slot in slots)  # they come first
        self._usual = count if self._usual is None else 0.9 * self._usual + 0.1 * count
        return LeftTick(
            [in_flight[slot] for slot in slots[:count]],
            ticked.ended[:count],
            None if ticked.logits is None else ticked.logits[:count],
            depths[:count],
            report[3 + 2 * num_leaving :],
        )

    def _entering(
        self, spans: Sequence[Span], hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ids = [i for span in spans for i in span.ids]
        missing = padded_size(len(ids), self.has_few_sizes) - len(ids)
        slots = [span.slot for span in spans for _ in span.ids]
        places = [place for span in spans for place in range(len(span.ids))]
        positions = [span.start + place for span in spans for place in range(len(span.ids))]
        rows = [ids, slots + [self.graph.spare_slot] * missing, positions, places]
        padded = [row + [0] * (len(ids) + missing - len(row)) for row in rows]
        given = None if hidden is None else F.pad(hidden, (0, 0, 0, missing))
        return torch.tensor(padded).to(self.cached.device, non_blocking=True), given

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
        if self.cached.policy.keeps_exited:
            index = ticked.is_unstored.nonzero()[:, 0]
            if len(index):
                rows = Rows(ticked.exited[index], ticked.rows[1][:, index])
                self.cached.unstored.append(rows)

    def _room(self, in_flight: dict[int, Span]) -> Room:
        leaving = len(in_flight)
        if self._usual is not None:  # one standard deviation more than usual, if it were Poisson's
            leaving = min(leaving, math.ceil(self._usual + math.sqrt(self._usual)))
        longest = 0
        if isinstance(self.graph.block_cache, Gathered):
            longest = max((span.start + len(span.ids) for span in in_flight.values()), default=0)
        sizes = (padded_size(n, self.has_few_sizes) for n in (self._num_running, leaving, longest))
        return Room(*(self._nothing.new_zeros(size, 0) for size in sizes))

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
            nowhere[[1, 0, 1, 1]].expand_as(entering),
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
    first, second = [*room, hidden, *rest], [entering, notes]
    if given is not None:
        first.append(given)
    if unstored is not None:
        first.append(unstored[0])
        second.append(unstored[1])
    return [(tensor, 0) for tensor in first] + [(tensor, 1) for tensor in second]
