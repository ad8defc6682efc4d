"""CachedModel: a MoRTransformer with caches, and the passes that take tokens through it.

The block runs once for all tokens in flight, whatever step each is at:

    begin: embedding, prelude -> route \\
                                        run: block, combine -> route -> exited -> end: coda
    tokens that stay in flight -------/                      |
          ^--------------------------------------------------'

It knows tokens, and neither spans nor requests: who holds it says what enters and when, and keeps
what leaves. `runner` does that for an engine's ticks, `incremental` for a caller's own loop.

Source: Bae et al. 2024 (arXiv 2410.20672), section 3.8, and Bae et al. 2025 (arXiv 2507.10524),
section 4.2.

Legend: `t` tokens in flight, `h` hidden.
"""

from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float, Int
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
from mor_layers.models import DecoderStack, MoRTransformer
from mor_layers.recursion import Exited, RecursionBlock
from mor_layers.selection import RoutingDecision, Tokens


class CachedModel:
    """A model, its caches, and what tokens do on their way through both.

    Args:
        model: on the device and in the precision to run with. Put into evaluation mode.
        settings: of the caches.

    Raises:
        ValueError: `kv_bytes` is not even one page, or experts drop tokens.
    """

    def __init__(self, model: MoRTransformer, settings: CacheSettings) -> None:
        self.model, self.settings = model.eval(), settings
        config = model.config
        if config.moe is not None and config.moe.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={config.moe.capacity_factor} of the experts would let requests "
                "push each other's tokens out. Serve the model with capacity_factor=None."
            )
        self.device = model.embedding.weight.device
        self.blocks = [block for block in model.recursions if isinstance(block, RecursionBlock)]
        # Layers that repeat one by one route nothing: their tokens go through all in one pass.
        self.is_pooled = len(self.blocks) == 1
        self.num_heads, self.num_steps = model.num_heads[0], self.blocks[0].router.num_recursions
        self.num_prelude = len(model.prelude.layers)
        self.num_straight = 0 if self.is_pooled else len(self.blocks) * self.num_steps
        num_outer = self.num_prelude + self.num_straight + len(model.coda.layers)
        num_inner = len(self.blocks[0].layers.layers) if self.is_pooled else 0
        self.caches = Caches(model, settings, num_outer, num_inner)
        self.policy, self.outer_pages = self.caches.policy, self.caches.outer_pages
        self.unstored: list[Rows] = []
        """Tokens that exited, and whose states the cache policy stores in the next pass."""

    def begin(self, ids: Tensor, slots: Tensor, positions: Tensor, places: Tensor) -> Pool:
        """Tokens behind embedding and prelude, and whatever else routes nothing.

        Args:
            ids: the tokens; those of a slot stand together, in order.
            slots: the sequence that each belongs to.
            positions: place of each in its text.
            places: place of each in its span.
        """
        hidden = self.model.embedding(ids)
        if len(slots) and self.outer_pages.num_pages:
            _, rows = self.outer_pages.append(slots)
            context = self._outer_context(slots, positions, rows)
            begun = hidden = self._stack(self.model.prelude, hidden, context)
            for index in range(self.num_straight):
                number, step = divmod(index, self.num_steps)
                block = self.blocks[number]
                own = replace(context, first_layer=self.num_prelude + index, step=step)
                begun = begun if step else hidden
                entering = block.enter(step, hidden, begun)
                hidden = block.run_layers(entering[:, None], own)[:, 0]  # [t h] -> [t 1 h] -> [t h]
        origin = hidden if self.blocks[0].needs_origin else None
        steps = torch.full_like(slots, self.num_straight)
        rows = Rows.of(hidden, slots, steps, positions, places)
        return Pool.at(0 if self.is_pooled else self.num_steps, self.num_steps, rows, origin)

    def route(self, pool: Pool) -> tuple[Pool, Rows | None]:
        """The tokens that go on to the step they are at, and those that exit; None: nobody does."""
        plans, gates = list(pool.plans), list(pool.gates)
        exits: dict[int, Tensor] = {}
        for step, own in pool.parts():
            if step == self.num_steps:  # through with all of them
                continue
            decision = self.blocks[0].route(
                pool.rows.hidden[None, own],  # [t h] -> [1 t h]
                step,
                self._known(pool, step, own),
                causal=True,
                assess=False,
            )
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
            return pool, None
        index = [i for i, exiting in enumerate(does_exit) if exiting]
        rows = pool.rows.take(torch.tensor(index).to(self.device))
        self._note_unstored(rows)
        return pool.take([i for i, exiting in enumerate(does_exit) if not exiting]), rows

    def in_flight(self, pool: Pool) -> tuple[TokensInFlight, TokensInFlight | None]:
        """What the cache policy is to make room for: running tokens, and `unstored` ones."""
        exited = _in_flight(Rows.joined(self.unstored)) if self.unstored else None
        return _in_flight(pool.rows), exited

    def run(self, pool: Pool) -> Pool:
        """The block on all tokens in flight, for which the cache must have room."""
        if not len(pool):
            return pool
        block, rows, parts = self.blocks[0], pool.rows, list(pool.parts())
        tokens, exited = self.in_flight(pool)
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
        self.unstored = []
        entering = rows.hidden
        if block.step_input is not None:
            entering = torch.cat(
                [block.enter(step, rows.hidden[own], pool.origin_of(own)) for step, own in parts]
            )
        output = block.run_layers(entering[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]
        combined = [self._combine(step, pool, own, output) for step, own in parts]
        return pool.advanced(torch.cat(combined), entered.entries)

    def end(
        self, hidden: Float[Tensor, "t h"], slots: Int[Tensor, " t"], positions: Int[Tensor, " t"]
    ) -> Float[Tensor, "t h"]:
        """States of tokens that have left the recursion, behind the coda."""
        if not self.model.coda.layers:
            return hidden
        rows = self.outer_pages.row_of[slots, positions]
        context = self._outer_context(slots, positions, rows)
        context = replace(context, first_layer=self.num_prelude + self.num_straight)
        return self._stack(self.model.coda, hidden, context)

    def drop(self, slot: int) -> None:
        """Forget a sequence's keys and values, and what was to be stored of it."""
        self.unstored = [rows.without(slot) for rows in self.unstored]
        self.caches.release(slot)

    def _outer_context(self, slots: Tensor, positions: Tensor, rows: Tensor) -> CachedContext:
        visible = Visible(self.outer_pages.row_of, slots, positions + 1)
        attention = CachedAttention(visible, slots, self.caches.outer, self.num_heads)
        tokens = Tokens(positions[:, None], self.settings.max_length)
        return CachedContext(0, tokens, self.caches.outer, 0, rows, attention)

    @staticmethod
    def _stack(stack: DecoderStack, hidden: Tensor, context: CachedContext) -> Tensor:
        return stack(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]

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

    def _note_unstored(self, exiting: Rows) -> None:
        if self.policy.keeps_exited and self.is_pooled:
            early = exiting.take((exiting.steps < self.num_steps).nonzero()[:, 0])
            if len(early):
                self.unstored.append(early)

    def _combine(self, step: int, pool: Pool, own: slice, output: Tensor) -> Tensor:
        origin = pool.origin_of(own)
        return self.blocks[0].combine(
            step,
            pool.rows.hidden[None, own],  # [t h] -> [1 t h]
            output[None, own],
            self._known(pool, step, own),
            None if origin is None else origin[None],
        )[0]

    def _exited_states(self, exited: TokensInFlight | None) -> Exited | None:
        if exited is None:
            return None
        hidden = Rows.joined(self.unstored).hidden
        tokens = Tokens(exited.positions[:, None], self.settings.max_length)
        return Exited(tokens, hidden[:, None])


def _in_flight(rows: Rows) -> TokensInFlight:
    """Rows as the cache wants to see them."""
    return TokensInFlight(rows.slots, rows.steps, rows.positions, rows.entries)
