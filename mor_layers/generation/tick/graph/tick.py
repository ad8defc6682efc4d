"""TickGraph: a whole tick as one function of tensors, whatever is in flight.

    enter: embedding, prelude, route -> run: block, combine -> route -> leave: coda, norm, logits
      ^                                  ^                      |                            |
      |            rows that stay -------'----------------------'                            |
      '------------------------ tokens that follow ------------------------ choose ----------'

Which row holds a token, at which step it is, what it writes and sees, which pages it takes and whether
it exits are values of tensors, never their shapes, and nothing waits for the device. A sequence leaves
when its token has exited. There is room for a number of them; who finds none leaves in the next tick,
which changes no result.

Legend: `t` rows, `e` rows of tokens that enter, `x` exited tokens whose states are stored now, `l`
sequences that leave, `s` slots, the last of which is spare, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.cache import KVArena, TokensInFlight, Visible
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.generation.tick.graph.attention import Gathered, ReadInPlace
from mor_layers.generation.tick.graph.choosing import Choosing, Chosen
from mor_layers.generation.tick.graph.context import StaticContext
from mor_layers.generation.tick.graph.routing import StaticRouting
from mor_layers.generation.tick.graph.rows import StaticRows, first_where
from mor_layers.generation.tick.in_flight import Rows
from mor_layers.generation.tick.span_exits import SpanExits
from mor_layers.models import DecoderStack
from mor_layers.recursion import Exited, Products
from mor_layers.selection import Tokens


class Room(NamedTuple):
    """Sizes that the host chooses, each as the length of an empty tensor `[n 0]`."""

    waiting: Tensor
    """Rows for the tokens that stay in flight: as many as there are, or more."""
    leaving: Tensor
    """Rows for sequences that leave."""
    seen: Tensor
    """Rows of the cache that a token sees at most; only `Gathered` needs it."""
    ways: Tensor
    """`[p q r 0]`: for each way of choosing tokens, rows for sequences that leave, and `FEWEST` more."""


class Ticked(NamedTuple):
    """What a tick returns."""

    report: Int[Tensor, " n"]
    """What the host must know: number of running tokens, of free pages of the layers that run once, and
    of the recursion; of the sequences that leave, slots, depths, next tokens, and whether these follow;
    `SpanExits.left`."""
    ended: Float[Tensor, "l h"]
    """States of the sequences that leave, after the last layer."""
    logits: Float[Tensor, "l v"] | None
    """Their logits; None if layers of another graph follow."""
    following: Int[Tensor, "4 l"]
    """Those of their next tokens that enter the next tick without the host; see `Chosen`."""
    is_through: Bool[Tensor, " s"]
    """Which sequences found no room to leave."""
    exited: Float[Tensor, "t h"]
    """States of all rows, as they leave the recursion."""
    is_unstored: Bool[Tensor, " t"]
    """Which rows hold a token that exited early, and whose state is not stored yet."""
    rows: tuple[Tensor, ...]
    """The tensors of `StaticRows`."""


class TickGraph:
    """The function, and what it changes in place: caches, lists of pages, and states of exited tokens.

    Args:
        cached: the model with its caches, which have a spare slot.
        routing: the router's rules.
        exits: where the states of exited tokens are kept until they leave.
        reads_in_place: whether attention reads the cache in place, see `attention`.
        reads_out: whether there are logits.
        products: computes the layers' products; None: they do it themselves.
    """

    def __init__(
        self,
        cached: CachedModel,
        routing: StaticRouting,
        exits: SpanExits,
        reads_in_place: bool,
        reads_out: bool = True,
        products: Products | None = None,
    ) -> None:
        self.cached, self.routing, self.exits = cached, routing, exits
        self.reads_out, self.products = reads_out, products
        self.model, self.policy, self.block = cached.model, cached.policy, cached.blocks[0]
        self.spare_slot = len(exits.left) - 1
        vocabulary = cached.model.config.vocab_size
        self.choosing = Choosing(self.spare_slot + 1, vocabulary, cached.device)
        self.nowhere = torch.tensor([[self.spare_slot], [0], [0], [0], [0]], device=cached.device)
        """The notes of a row that holds no token, `[5 1]`."""

        def cache(arena: KVArena, first_layer: int) -> ReadInPlace | Gathered:
            if reads_in_place:
                return ReadInPlace(arena, cached.num_heads, first_layer)
            return Gathered(arena, first_layer)

        self.prelude_cache = cache(cached.caches.outer, 0)
        self.block_cache = cache(cached.caches.inner, 0)
        self.coda_cache = cache(cached.caches.outer, cached.num_prelude)

    def __call__(
        self,
        entering: Int[Tensor, "4 e"],
        given: Float[Tensor, "e h"] | None,
        unstored: tuple[Float[Tensor, "x h"], Int[Tensor, "5 x"]] | None,
        is_through: Bool[Tensor, " s"],
        room: Room,
        waiting: tuple[Tensor, ...],
    ) -> Ticked:
        """Run a tick.

        Args:
            entering: ids, slots, positions, and places in the span.
            given: states to enter with; None: embed the ids.
            unstored: states and notes of tokens that have exited, if the policy stores them.
            is_through: sequences that found no room to leave in the last tick.
            waiting: the tensors of `StaticRows` after the last tick.
        """
        new, is_early = self._enter(entering, given, room)
        old = StaticRows(*waiting).packed(len(room.waiting), self.nowhere)
        rows, is_early = old.behind(new), torch.cat([is_early, torch.zeros_like(old.is_running)])
        tokens, exited = self._in_flight(rows, len(new.slots), is_early, unstored)
        rows = self._run(rows, tokens, exited, room)
        rows, is_exit = self._route(rows)
        states, is_ready = self._note_exits(rows, is_exit | is_early, is_through)
        slots, is_leaving = first_where(is_ready, len(room.leaving))
        slots = torch.where(is_leaving, slots, self.spare_slot)
        ended = self._leave(slots, is_leaving, room)
        logits = self._logits(ended)
        chosen = self._choose(logits, slots, room)
        return Ticked(
            self._report(rows, slots, chosen),
            ended,
            logits,
            chosen.following,
            is_ready.scatter(0, slots, torch.zeros_like(is_leaving)),
            states,
            is_exit & (rows.steps < self.routing.num_steps),
            rows.tensors,
        )

    def _enter(
        self, entering: Int[Tensor, "4 e"], given: Float[Tensor, "e h"] | None, room: Room
    ) -> tuple[StaticRows, Bool[Tensor, " e"]]:
        """Run the layers before the recursion, and route. The second result: who runs no step."""
        ids, slots, positions, places = entering.unbind()
        is_token = slots != self.spare_slot
        self.exits.expect(slots, is_token)
        hidden = self.model.embedding(ids) if given is None else given
        if self.cached.outer_pages.num_pages:
            _, rows = self.cached.outer_pages.append_in_graph(slots, is_token)
            at = slots, positions, rows, is_token, room
            hidden = self._outer(self.model.prelude, self.prelude_cache, hidden, *at)
        states = self.block.begin(hidden)
        plan = torch.zeros(
            len(states), self.routing.widest, dtype=self.routing.plan_dtype, device=states.device
        )
        runs, plan, gates = self.routing.decide(0, states, positions, plan)
        zeros = torch.zeros_like(slots)
        notes = torch.stack([slots, zeros, positions, places, zeros])
        origin = states if self.block.needs_origin else states[:, :0]
        return StaticRows(states, notes, runs & is_token, plan, gates, origin), ~runs & is_token

    def _in_flight(
        self,
        rows: StaticRows,
        num_new: int,
        is_early: Bool[Tensor, " t"],
        unstored: tuple[Tensor, Tensor] | None,
    ) -> tuple[TokensInFlight, tuple[TokensInFlight, Exited] | None]:
        """The tokens that the cache must make room for: running ones, and exited ones to be stored."""
        notes = torch.where(rows.is_running, rows.notes, self.nowhere)
        tokens = _tokens(notes, rows.is_running, num_new)
        if unstored is None:
            return tokens, None
        hidden, notes = unstored
        is_token = notes[0] != self.spare_slot
        if self.routing.may_exit[0]:  # tokens that run no step are stored at once
            early = torch.where(is_early, rows.notes, self.nowhere)[:, :num_new]
            hidden = torch.cat([hidden, self.block.end(rows.hidden[:num_new])])
            notes = torch.cat([notes, early], dim=1)
            is_token = torch.cat([is_token, is_early[:num_new]])
        states = Exited(Tokens(notes[2][:, None], self.policy.max_length), hidden[:, None])
        return tokens, (_tokens(notes, is_token), states)

    def _run(
        self,
        rows: StaticRows,
        tokens: TokensInFlight,
        exited: tuple[TokensInFlight, Exited] | None,
        room: Room,
    ) -> StaticRows:
        """Run the block on the rows that hold a running token."""
        exited_tokens, exited_states = exited or (None, None)
        entered = self.policy.enter(tokens, exited_tokens)
        is_written = rows.is_running
        if exited_tokens is not None and exited_tokens.is_running is not None:
            is_written = torch.cat([is_written, exited_tokens.is_running])
        count = entered.rows.shape[0]
        writes = entered.rows, is_written[:count]
        cache = self.block_cache.open(
            entered.visible, tokens.slots, rows.is_running, *writes, room.seen.shape[0]
        )
        context = StaticContext(
            tokens.steps[:, None],
            Tokens(tokens.positions[:, None], self.policy.max_length),
            self.routing.num_steps,
            cache,
            count,
            exited_states,
            self.policy.projects_alike,
            self.products,
        )
        states, origin = rows.hidden, rows.origin_or_none
        entering = states
        if self.block.enters_changed:
            entering = self._at_own_step(rows, lambda r: self.block.enter(r, states, origin))
        output = self.block.run_layers(entering[:, None], context)[
            :, 0
        ]  # [t h] -> [t 1 h] -> [t h]
        combined = self._at_own_step(rows, lambda r: self.routing.combine(r, rows, output))
        slots, steps, positions, places, _ = rows.notes.unbind()
        steps = steps + rows.is_running
        return replace(
            rows,
            hidden=torch.where(rows.is_running[:, None], combined, states),
            notes=torch.stack([slots, steps, positions, places, entered.entries]),
        )

    def _route(self, rows: StaticRows) -> tuple[StaticRows, Bool[Tensor, " t"]]:
        """Decide who runs another step. The second result: who exits."""
        runs = rows.is_running & (rows.steps < self.routing.num_steps)
        plan, gates = rows.plan, rows.gates
        for step in range(1, self.routing.num_steps):
            decided = self.routing.decide(step, rows.hidden, rows.positions, rows.plan)
            is_own = rows.steps == step
            runs = runs & (decided[0] | ~is_own)
            plan = torch.where(is_own[:, None], decided[1], plan)
            gates = torch.where(is_own, decided[2], gates)
        return replace(rows, is_running=runs, plan=plan, gates=gates), rows.is_running & ~runs

    def _note_exits(
        self, rows: StaticRows, is_exit: Bool[Tensor, " t"], is_through: Bool[Tensor, " s"]
    ) -> tuple[Float[Tensor, "t h"], Bool[Tensor, " s"]]:
        """Keep the states of exited tokens. The second result: which sequences can leave."""
        states = self.block.end(rows.hidden)
        notes = torch.where(is_exit, rows.notes, self.nowhere)
        self.exits.note(Rows(states, notes), is_exit)
        has_exit = torch.zeros_like(is_through).index_put((notes[0],), is_exit)
        return states, is_through | (has_exit & (self.exits.left == 0))

    def _leave(
        self, slots: Int[Tensor, " l"], is_leaving: Bool[Tensor, " l"], room: Room
    ) -> Float[Tensor, "l h"]:
        """Run the layers after the recursion on sequences whose only token in flight has exited."""
        hidden, positions = self.exits.hidden[slots, 0], self.exits.positions[slots, 0]
        if not self.model.coda.layers:
            return hidden
        rows = self.cached.outer_pages.row_of[slots, positions]
        at = slots, positions, rows, is_leaving, room
        return self._outer(self.model.coda, self.coda_cache, hidden, *at)

    def _logits(self, ended: Float[Tensor, "l h"]) -> Float[Tensor, "l v"] | None:
        if not self.reads_out:
            return None
        normed = self.model.norm(ended)
        if self.products is None:
            return self.model.output(normed)
        (logits,) = self.products((self.model.output,), normed, None)
        return logits

    def _choose(
        self, logits: Float[Tensor, "l v"] | None, slots: Int[Tensor, " l"], room: Room
    ) -> Chosen:
        """Choose the next tokens of the sequences that leave, if the logits are here."""
        if logits is None:
            return self.choosing.nothing(slots)
        positions = self.exits.positions[slots, 0]
        return self.choosing(logits, slots, positions, room.ways)

    def _report(
        self, rows: StaticRows, slots: Int[Tensor, " l"], chosen: Chosen
    ) -> Int[Tensor, " n"]:
        pages = self.cached.outer_pages, self.policy.pages
        free = [own.num_free_in_graph for own in pages]
        leaving = slots, self.exits.depths[slots, 0], chosen.tokens, chosen.goes_on.long()
        return torch.cat([rows.is_running.sum()[None], *free, *leaving, self.exits.left])

    def _outer(
        self,
        stack: DecoderStack,
        cache: ReadInPlace | Gathered,
        hidden: Float[Tensor, "k h"],
        slots: Int[Tensor, " k"],
        positions: Int[Tensor, " k"],
        rows: Int[Tensor, " k"],
        is_token: Bool[Tensor, " k"],
        room: Room,
    ) -> Float[Tensor, "k h"]:
        """Run layers outside of the recursion."""
        visible = Visible(self.cached.outer_pages.row_of, slots, positions + 1)
        context = StaticContext(
            0,  # type: ignore[arg-type]
            Tokens(positions[:, None], self.policy.max_length),
            1,
            cache.open(visible, slots, is_token, rows, is_token, room.seen.shape[0]),
            hidden.shape[0],
            products=self.products,
        )
        return stack(hidden[:, None], context)[:, 0]  # [k h] -> [k 1 h] -> [k h]

    def _at_own_step(
        self, rows: StaticRows, run: Callable[[int], Float[Tensor, "t w"]]
    ) -> Float[Tensor, "t w"]:
        """What `run` makes of the rows at each step, of which a row gets that of its own."""
        result = run(0)
        for step in range(1, self.routing.num_steps):
            result = torch.where((rows.steps == step)[:, None], run(step), result)
        return result


def _tokens(
    notes: Int[Tensor, "5 t"], is_token: Bool[Tensor, " t"], num_first: int | None = None
) -> TokensInFlight:
    slots, steps, positions, _, entries = notes.unbind()
    return TokensInFlight(slots, steps, positions, entries, False, is_token, num_first)
