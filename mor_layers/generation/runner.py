"""Runs tokens of many sequences through a MoRTransformer with caches: continuous depth-wise batching.

Every tick runs the shared block once, on all tokens in flight, whatever step each is at:

    new tokens -> prelude -> route \\
                                     block -> combine -> route -> exited -> coda -> logits
    tokens that stay in flight ----/                      |
          ^-----------------------------------------------'

Source: Bae et al. 2024 (arXiv 2410.20672), section 3.8, and Bae et al. 2025 (arXiv 2507.10524),
section 4.2.

Legend: `t` tokens in flight, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.cache import (
    CachedAttention,
    CachedContext,
    Caches,
    CacheSettings,
    TokensInFlight,
    Visible,
)
from mor_layers.generation.in_flight import Pool, Rows
from mor_layers.generation.scheduling import Span
from mor_layers.models import DecoderStack, MoRTransformer
from mor_layers.recursion import Exited, RecursionBlock
from mor_layers.selection import RoutingDecision, Tokens


@dataclass(frozen=True)
class FinishedSpan:
    """A span that went through the whole model."""

    span: Span
    depths: list[int]
    """Steps that each of its tokens took."""


@dataclass(frozen=True)
class Finished:
    """What left the model in a tick."""

    spans: list[FinishedSpan]
    """Those that complete what is known of their sequence come first."""
    logits: Float[Tensor, "b v"]
    """Logits of the token that follows, one row for each of those."""


class Decoder:
    """A model with caches, and the tokens that are in it.

    Args:
        model: on the device and in the precision to run with. Put into evaluation mode.
        settings: of the caches.
        max_span: tokens of the longest span.

    Raises:
        ValueError: `kv_bytes` is not even one page, or experts drop tokens.
    """

    def __init__(self, model: MoRTransformer, settings: CacheSettings, max_span: int) -> None:
        self.model, self.settings = model.eval(), settings
        config, embedding = model.config, model.embedding.weight
        if config.moe is not None and config.moe.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={config.moe.capacity_factor} of the experts would let requests "
                "push each other's tokens out. Serve the model with capacity_factor=None."
            )
        self.device = embedding.device
        self.blocks = [block for block in model.recursions if isinstance(block, RecursionBlock)]
        # Layers that repeat one by one route nothing: their tokens go through all in one tick.
        self.is_pooled = len(self.blocks) == 1
        self.num_heads, self.num_steps = model.num_heads[0], self.blocks[0].router.num_recursions
        self.num_prelude = len(model.prelude.layers)
        self.num_straight = 0 if self.is_pooled else len(self.blocks) * self.num_steps
        num_outer = self.num_prelude + self.num_straight + len(model.coda.layers)
        num_inner = len(self.blocks[0].layers.layers) if self.is_pooled else 0
        self.caches = Caches(model, settings, num_outer, num_inner)
        self.policy, self.outer_pages = self.caches.policy, self.caches.outer_pages

        nowhere = torch.zeros(4, 0, dtype=torch.long, device=self.device)
        nobody = Rows.of(embedding.detach()[:0], *nowhere)
        self._waiting = Pool.at(0, self.num_steps, nobody)  # for their next step, not the first
        self._through: list[Rows] = []  # tokens that exit in this tick
        self._exited: list[Rows] = []  # tokens whose states the cache policy is to store
        self._spans: dict[int, Span] = {}
        self._left = torch.zeros(settings.num_slots, dtype=torch.long, device=self.device)
        size = (settings.num_slots, max_span)
        self._final = torch.zeros(*size, embedding.shape[1], dtype=embedding.dtype).to(self.device)
        self._depths = torch.zeros(size, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def tick(self, spans: list[Span], make_room: Callable[[], int]) -> Finished:
        """Let spans enter, and run every token in flight once through the block.

        Args:
            spans: of slots that have none in flight.
            make_room: called when pages run out; it gives up a sequence and returns its slot.
        """
        entering = self._route(self._enter(spans, make_room))
        pool = self._fit(self._waiting.behind(entering), make_room)
        self._waiting = self._route(self._run(pool))
        self._note_exits()
        return self._leave()

    def drop(self, slot: int) -> None:
        """Forget a sequence: its tokens in flight, its keys and values."""
        self._spans.pop(slot, None)
        self._left[slot] = 0
        self._waiting = self._waiting.without(slot)
        self._through = [rows.without(slot) for rows in self._through]
        self._exited = [rows.without(slot) for rows in self._exited]
        self.caches.release(slot)

    def _enter(self, spans: list[Span], make_room: Callable[[], int]) -> Pool:
        """Embedding and prelude; and all other layers where nothing is routed."""
        while True:
            slots, positions, places = self._places(spans)
            if not self.outer_pages.num_pages or self.outer_pages.fits(slots):
                break
            slot = make_room()
            self.drop(slot)
            spans = [span for span in spans if span.slot != slot]
        for span in spans:
            self._spans[span.slot] = span
        self._left.index_add_(0, slots, torch.ones_like(slots))
        ids = torch.tensor([i for span in spans for i in span.ids], dtype=torch.long)
        return self._begin(ids.to(self.device), slots, positions, places)

    def _begin(self, ids: Tensor, slots: Tensor, positions: Tensor, places: Tensor) -> Pool:
        """Tokens behind embedding and prelude, and whatever else routes nothing."""
        hidden = self.model.embedding(ids)
        if len(slots) and self.outer_pages.num_pages:
            _, rows = self.outer_pages.append(slots)
            context = self._outer_context(slots, positions, rows)
            begun = hidden = self._layers(self.model.prelude, hidden, context)
            for index in range(self.num_straight):
                block, step = divmod(index, self.num_steps)
                own = replace(context, first_layer=self.num_prelude + index, step=step)
                begun = begun if step else hidden
                entering = self.blocks[block].enter(step, hidden, begun)
                hidden = self._layers(self.blocks[block].layers, entering, own)
        origin = hidden if self.blocks[0].needs_origin else None
        steps = torch.full_like(slots, self.num_straight)
        rows = Rows.of(hidden, slots, steps, positions, places)
        return Pool.at(0 if self.is_pooled else self.num_steps, self.num_steps, rows, origin)

    def _places(self, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, position and place in the span of each token."""
        tokens = [(s.slot, s.start + i, i) for s in spans for i in range(len(s.ids))]
        slots, positions, places = torch.tensor(tokens, dtype=torch.long).view(-1, 3).T
        return slots.to(self.device), positions.to(self.device), places.to(self.device)

    def _outer_context(self, slots: Tensor, positions: Tensor, rows: Tensor) -> CachedContext:
        visible = Visible(self.outer_pages.row_of, slots, positions + 1)
        attention = CachedAttention(visible, slots, self.caches.outer, self.num_heads)
        tokens = Tokens(positions[:, None], self.settings.max_length)
        return CachedContext(0, tokens, self.caches.outer, 0, rows, attention)

    @staticmethod
    def _layers(stack: DecoderStack, hidden: Tensor, context: CachedContext) -> Tensor:
        return stack(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]

    def _route(self, pool: Pool) -> Pool:
        """The tokens that go on to the step they are at; the others exit."""
        plans, gates = list(pool.plans), list(pool.gates)
        exits: dict[int, Tensor] = {}
        for step, own in pool.parts():
            if step == self.num_steps:  # through with all of them
                continue
            decision = self._decide(step, pool.rows.hidden[None, own], self._known(pool, step, own))
            plans[step] = None if decision.plan is None else decision.plan[0]
            gates[step] = None if decision.gates is None else decision.gates[0]
            if decision.tokens.is_padding is not None:
                exits[step] = decision.tokens.is_padding[0]
        pool = replace(pool, plans=tuple(plans), gates=tuple(gates))
        # One wait for the device, whatever the number of steps.
        answers = iter(torch.cat(list(exits.values())).tolist() if exits else ())
        does_exit: list[bool] = []
        for step, count in enumerate(pool.counts):
            is_asked = step in exits
            does_exit += islice(answers, count) if is_asked else [step == self.num_steps] * count
        if not any(does_exit):
            return pool
        index = [i for i, exiting in enumerate(does_exit) if exiting]
        self._exit(pool.rows.take(torch.tensor(index).to(self.device)))
        return pool.take([i for i, exiting in enumerate(does_exit) if not exiting])

    def _decide(self, step: int, hidden: Tensor, known: RoutingDecision) -> RoutingDecision:
        router = self.blocks[0].router
        return router.decide(router.logits(hidden, step), step, known, causal=True)

    def _known(self, pool: Pool, step: int, own: slice) -> RoutingDecision:
        """What is decided about the tokens of a step: one a sequence, as `[1 t]`.

        Whatever causal rule a router has, it decides token by token.
        """
        plan, gates = pool.plans[step], pool.gates[step]
        return RoutingDecision(
            Tokens(pool.rows.positions[None, own], self.settings.max_length),
            plan=None if plan is None else plan[None],
            gates=None if gates is None else gates[None],
        )

    def _exit(self, rows: Rows) -> None:
        """Tokens that are through with the recursion."""
        self._through.append(rows)
        if self.policy.keeps_exited and self.is_pooled:
            early = rows.take((rows.steps < self.num_steps).nonzero()[:, 0])
            if len(early):
                self._exited.append(early)

    def _note_exits(self) -> None:
        """Final states and depths of this tick's exits, from any step at once."""
        if not self._through:
            return
        rows, self._through = Rows.joined(self._through), []
        self._final[rows.slots, rows.places] = rows.hidden
        self._depths[rows.slots, rows.places] = rows.steps
        self._left.index_add_(0, rows.slots, -torch.ones_like(rows.slots))

    def _fit(self, pool: Pool, make_room: Callable[[], int]) -> Pool:
        """As many of the tokens as the cache has room for: sequences give way until they fit."""
        while len(pool) and not self.policy.fits(*self._in_flight(pool)):
            slot = make_room()
            self.drop(slot)
            pool = pool.without(slot)
        return pool

    def _in_flight(self, pool: Pool) -> tuple[TokensInFlight, TokensInFlight | None]:
        exited = _in_flight(Rows.joined(self._exited)) if self._exited else None
        return _in_flight(pool.rows), exited

    def _run(self, pool: Pool) -> Pool:
        """The block on all tokens in flight."""
        if not len(pool):
            return pool
        block, rows, parts = self.blocks[0], pool.rows, list(pool.parts())
        tokens, exited = self._in_flight(pool)
        entered = self.policy.enter(tokens, exited)
        context = CachedContext(
            parts[0][0] if len(parts) == 1 else tokens.steps[:, None],
            Tokens(tokens.positions[:, None], self.settings.max_length),
            self.caches.inner,
            0,
            entered.rows,
            CachedAttention(entered.visible, tokens.slots, self.caches.inner, self.num_heads),
            self._exited_states(exited),
            pool.counts[:-1],
        )
        self._exited = []
        hidden = rows.hidden
        if block.step_input is not None:
            entering = [block.enter(step, hidden[own], pool.origin_of(own)) for step, own in parts]
            hidden = torch.cat(entering)
        output = self._layers(block.layers, hidden, context)
        combined = [self._combine(step, pool, own, output) for step, own in parts]
        return pool.advanced(torch.cat(combined), entered.entries)

    def _combine(self, step: int, pool: Pool, own: slice, output: Tensor) -> Tensor:
        origin = pool.origin_of(own)
        selected, output = pool.rows.hidden[None, own], output[None, own]
        return self.blocks[0].router.combine(
            step,
            selected,
            output,
            self._known(pool, step, own),
            None if origin is None else origin[None],
        )[0]

    def _exited_states(self, exited: TokensInFlight | None) -> Exited | None:
        if exited is None:
            return None
        hidden = Rows.joined(self._exited).hidden
        tokens = Tokens(exited.positions[:, None], self.settings.max_length)
        return Exited(tokens, hidden[:, None])

    def _leave(self) -> Finished:
        """Coda and logits of the spans whose tokens have all exited."""
        left = self._left.tolist()
        spans = [span for slot, span in self._spans.items() if left[slot] == 0]
        spans.sort(key=lambda span: not span.is_last)
        vocabulary = self.model.config.vocab_size
        if not spans:
            return Finished([], self._final.new_zeros(0, vocabulary))
        for span in spans:
            del self._spans[span.slot]
        slots, positions, places = self._places(spans)
        hidden = self._end(slots, positions, places)
        depths = iter(self._depths[slots, places].tolist())
        finished = [FinishedSpan(span, list(islice(depths, len(span.ids)))) for span in spans]
        ends = accumulate(len(span.ids) for span in spans if span.is_last)
        index = torch.tensor([end - 1 for end in ends], dtype=torch.long).to(self.device)
        return Finished(finished, self.model.output(self.model.norm(hidden[index])))

    def _end(self, slots: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """States of tokens that have left the recursion, behind the coda."""
        hidden = self._final[slots, places]
        if not self.model.coda.layers:
            return hidden
        rows = self.outer_pages.row_of[slots, positions]
        context = self._outer_context(slots, positions, rows)
        context = replace(context, first_layer=self.num_prelude + self.num_straight)
        return self._layers(self.model.coda, hidden, context)


def _in_flight(rows: Rows) -> TokensInFlight:
    """Rows as the cache wants to see them."""
    return TokensInFlight(rows.slots, rows.steps, rows.positions, rows.entries)
