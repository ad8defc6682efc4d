"""Runs tokens of many sequences through a MoRTransformer with caches: continuous depth-wise batching.

Every tick runs the shared block once, on all tokens in flight, whatever step each is at:

    new tokens -> prelude -> route \\
                                     block -> combine -> route -> exited -> coda -> logits
    tokens that stay in flight ----/                      |
          ^-----------------------------------------------'

Source: Bae et al. 2024 (arXiv 2410.20672), section 3.8, and Bae et al. 2025 (arXiv 2507.10524),
section 4.2.

Legend: `t` tokens in flight, `h` hidden, `p` numbers that a router plans per token, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.attention import Exited
from mor_layers.cached_attention import CachedAttention, CachedContext
from mor_layers.caches import Caches, CacheSettings
from mor_layers.kv_cache import TokensInFlight, Visible
from mor_layers.recursion import RecursionBlock
from mor_layers.routing import RoutingDecision, Tokens
from mor_layers.scheduling import Span
from mor_layers.transformer import DecoderStack, MoRTransformer


@dataclass(frozen=True)
class Rows:
    """Tokens in flight that are at one step, with what travels along."""

    hidden: Float[Tensor, "t h"]
    slots: Int[Tensor, " t"]
    positions: Int[Tensor, " t"]
    places: Int[Tensor, " t"]
    """Place of each in its span."""
    entries: Int[Tensor, " t"]
    """What the cache policy wants to hear again."""
    origin: Float[Tensor, "t h"] | None = None
    """States that entered the recursion, where the router asks for them."""
    plan: Float[Tensor, "t p"] | None = None
    gates: Float[Tensor, " t"] | None = None

    def take(self, index: Int[Tensor, " k"]) -> "Rows":
        """Some of the tokens."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Rows(
            **{n: None if f is None else f.index_select(0, index) for n, f in fields.items()}
        )

    def without(self, slot: int) -> "Rows":
        """The tokens of all other sequences."""
        return self.take((self.slots != slot).nonzero()[:, 0])


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

        self._waiting: list[Rows] = []  # by the step they run next, from 1 on
        self._through: list[tuple[int, Rows]] = []  # steps run; rows that exit in this tick
        self._exited: list[tuple[int, Rows]] = []  # the same; rows whose states are to be stored
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
        running = [self._enter(spans, make_room), *self._waiting]
        self._waiting = []
        if self.is_pooled:
            running[0] = self._route(0, running[0])
            running = self._fit(running, make_room)
            outputs = self._run(running)
            for step, rows in enumerate(outputs, start=1):
                if step < self.num_steps:
                    self._waiting.append(self._route(step, rows))
                else:
                    self._exit(rows, step)
        else:
            self._exit(running[0], self.num_straight)
        self._note_exits()
        return self._leave()

    def drop(self, slot: int) -> None:
        """Forget a sequence: its tokens in flight, its keys and values."""
        self._spans.pop(slot, None)
        self._left[slot] = 0
        self._waiting = [rows.without(slot) for rows in self._waiting]
        self._through = [(step, rows.without(slot)) for step, rows in self._through]
        self._exited = [(step, rows.without(slot)) for step, rows in self._exited]
        self.caches.release(slot)

    def _enter(self, spans: list[Span], make_room: Callable[[], int]) -> Rows:
        """Embedding and prelude; and all other layers where nothing is routed."""
        while True:
            slots, positions, places = self._places(spans)
            if not self.outer_pages.num_pages:
                break
            if self.outer_pages.pages_needed(slots) <= self.outer_pages.pages_free:
                break
            slot = make_room()
            self.drop(slot)
            spans = [span for span in spans if span.slot != slot]
        for span in spans:
            self._spans[span.slot] = span
        self._left.index_add_(0, slots, torch.ones_like(slots))
        ids = torch.tensor([i for span in spans for i in span.ids], dtype=torch.long)
        return self._begin(ids.to(self.device), slots, positions, places)

    def _begin(self, ids: Tensor, slots: Tensor, positions: Tensor, places: Tensor) -> Rows:
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
        return Rows(hidden, slots, positions, places, torch.zeros_like(slots), origin)

    def _places(self, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, position and place in the span of each token."""
        shape = torch.tensor([(s.slot, s.start, len(s.ids)) for s in spans], dtype=torch.long)
        slots, starts, lengths = shape.view(-1, 3).to(self.device).unbind(1)
        slot = slots.repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        place = torch.arange(len(slot), device=self.device) - first
        return slot, starts.repeat_interleave(lengths) + place, place

    def _outer_context(self, slots: Tensor, positions: Tensor, rows: Tensor) -> CachedContext:
        visible = Visible(self.outer_pages.row_of, slots, positions + 1)
        attention = CachedAttention(visible, slots, self.caches.outer, self.num_heads)
        tokens = Tokens(positions[:, None], self.settings.max_length)
        return CachedContext(0, tokens, self.caches.outer, 0, rows, attention)

    @staticmethod
    def _layers(stack: DecoderStack, hidden: Tensor, context: CachedContext) -> Tensor:
        return stack(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]

    def _route(self, step: int, rows: Rows) -> Rows:
        """The tokens that go on to a step; the others exit."""
        if not len(rows.slots):
            return rows
        router = self.blocks[0].router
        # One token a sequence: whatever causal rule a router has, it decides token by token.
        tokens = Tokens(rows.positions[None], self.settings.max_length)
        previous = RoutingDecision(tokens, plan=None if rows.plan is None else rows.plan[None])
        logits = router.logits(rows.hidden[None], step)
        decision = router.decide(logits, step, previous, causal=True)
        plan = None if decision.plan is None else decision.plan[0]
        rows = replace(rows, plan=plan, gates=None if decision.gates is None else decision.gates[0])
        if decision.tokens.is_padding is None:
            return rows
        goes_on = decision.tokens.is_padding[0].logical_not()
        self._exit(rows.take(goes_on.logical_not().nonzero()[:, 0]), step)
        return rows.take(goes_on.nonzero()[:, 0])

    def _exit(self, rows: Rows, steps: int) -> None:
        """Tokens that are through with the recursion after so many steps."""
        if not len(rows.slots):
            return
        self._through.append((steps, rows))
        if self.policy.keeps_exited and self.is_pooled and steps < self.num_steps:
            self._exited.append((steps, rows))

    def _note_exits(self) -> None:
        """Final states and depths of this tick's exits, from any step at once."""
        if not self._through:
            return
        parts = [rows for _, rows in self._through]
        exited, self._through = _joined(self._through), []
        places = torch.cat([rows.places for rows in parts])
        self._final[exited.slots, places] = torch.cat([rows.hidden for rows in parts])
        self._depths[exited.slots, places] = exited.steps
        self._left.index_add_(0, exited.slots, -torch.ones_like(exited.slots))

    def _fit(self, running: list[Rows], make_room: Callable[[], int]) -> list[Rows]:
        """As many of the tokens as the cache has room for: sequences give way until they fit."""
        while any(len(rows.slots) for rows in running):
            tokens, exited = self._in_flight(running)
            if self.policy.pages_needed(tokens, exited) <= self.policy.pages.pages_free:
                break
            slot = make_room()
            self.drop(slot)
            running = [rows.without(slot) for rows in running]
        return running

    def _in_flight(self, running: list[Rows]) -> tuple[TokensInFlight, TokensInFlight | None]:
        exited = _joined(self._exited) if self._exited else None
        return _joined(list(enumerate(running))), exited

    def _run(self, running: list[Rows]) -> list[Rows]:
        """The block on all tokens in flight; `running` has one entry for each step."""
        if not any(len(rows.slots) for rows in running):
            return running
        block = self.blocks[0]
        tokens, exited = self._in_flight(running)
        entered = self.policy.enter(tokens, exited)
        hidden = torch.cat(
            [block.enter(step, rows.hidden, rows.origin) for step, rows in enumerate(running)]
        )
        steps = [step for step, rows in enumerate(running) if len(rows.slots)]
        step = steps[0] if len(steps) == 1 else tokens.steps[:, None]
        context = CachedContext(
            step,
            Tokens(tokens.positions[:, None], self.settings.max_length),
            self.caches.inner,
            0,
            entered.rows,
            CachedAttention(entered.visible, tokens.slots, self.caches.inner, self.num_heads),
            self._exited_states(exited),
            tuple(len(rows.slots) for rows in running),
        )
        self._exited = []
        output = self._layers(block.layers, hidden, context)
        sizes = [len(rows.slots) for rows in running]
        parts = zip(running, output.split(sizes), entered.entries.split(sizes), strict=True)
        return [
            replace(rows, hidden=self._combine(step, rows, own), entries=entries)
            for step, (rows, own, entries) in enumerate(parts)
        ]

    def _exited_states(self, exited: TokensInFlight | None) -> Exited | None:
        if exited is None:
            return None
        hidden = torch.cat([rows.hidden for _, rows in self._exited])
        tokens = Tokens(exited.positions[:, None], self.settings.max_length)
        return Exited(tokens, hidden[:, None])

    def _combine(self, step: int, rows: Rows, output: Tensor) -> Tensor:
        if not len(rows.slots):
            return output
        decision = RoutingDecision(
            Tokens(rows.positions[None], self.settings.max_length),
            gates=None if rows.gates is None else rows.gates[None],
            plan=None if rows.plan is None else rows.plan[None],
        )
        origin = None if rows.origin is None else rows.origin[None]
        router = self.blocks[0].router
        return router.combine(step, rows.hidden[None], output[None], decision, origin)[0]

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
        depths = self._depths[slots, places].split([len(span.ids) for span in spans])
        finished = [FinishedSpan(s, d.tolist()) for s, d in zip(spans, depths, strict=True)]
        ends = torch.tensor([len(span.ids) for span in spans], device=self.device).cumsum(0) - 1
        ends = ends[: sum(span.is_last for span in spans)]
        return Finished(finished, self.model.output(self.model.norm(hidden[ends])))

    def _end(self, slots: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """States of tokens that have left the recursion, behind the coda."""
        hidden = self._final[slots, places]
        if not self.model.coda.layers:
            return hidden
        rows = self.outer_pages.row_of[slots, positions]
        context = self._outer_context(slots, positions, rows)
        context = replace(context, first_layer=self.num_prelude + self.num_straight)
        return self._layers(self.model.coda, hidden, context)


def _joined(parts: list[tuple[int, Rows]]) -> TokensInFlight:
    """Rows with their steps, as the cache wants to see them."""
    rows = [rows for _, rows in parts]
    slots = torch.cat([r.slots for r in rows])
    counts = torch.tensor([len(r.slots) for r in rows])
    steps = torch.tensor([step for step, _ in parts]).repeat_interleave(counts)
    return TokensInFlight(
        slots,
        steps.to(slots.device),
        torch.cat([r.positions for r in rows]),
        torch.cat([r.entries for r in rows]),
    )
