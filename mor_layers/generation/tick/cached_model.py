"""CachedModel: a MoRTransformer with caches, and the passes that tokens go through.

The block runs once for all tokens in flight, even if they are at different steps:

    begin: embedding, prelude -> route \\
                                        run: block, combine -> route -> exited -> end: coda
    tokens that stay in flight -------/                      |
          ^--------------------------------------------------'

This class handles tokens and knows nothing about spans or requests. Its owner decides which tokens
enter and when, and stores the states of those that exit. There are two owners: `runner` for the ticks
of an engine, and `incremental` for a loop of the caller.

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
    Entered,
    TokensInFlight,
    Visible,
)
from mor_layers.generation.products import Products
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.models import DecoderStack, MoRTransformer
from mor_layers.recursion import Exited, RecursionBlock
from mor_layers.selection import RoutingDecision, Tokens


class CachedModel:
    """A model with its caches, and the passes that tokens go through.

    Args:
        model: the model, on the device and in the precision to use. It is put into evaluation mode.
        settings: size and layout of the caches.
        products: computes the layers' matrix products. Default: with the model's own weights.
        has_spare_slot: whether the caches have one more slot than sequences, see `Caches`.

    Raises:
        ValueError: `kv_bytes` is less than one page, or the experts drop tokens.
    """

    def __init__(
        self,
        model: MoRTransformer,
        settings: CacheSettings,
        products: Products | None = None,
        has_spare_slot: bool = False,
    ) -> None:
        self.model, self.settings = model.eval(), settings
        self.products = products or Products()
        config = model.config
        if config.moe is not None and config.moe.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={config.moe.capacity_factor} lets experts drop tokens, so one "
                "request could change the output of another. Use capacity_factor=None to serve."
            )
        self.device = model.embedding.weight.device
        self.blocks = [block for block in model.recursions if isinstance(block, RecursionBlock)]
        # In the 'sequence' schemes each layer repeats by itself and no token is routed, so tokens
        # run all layers in one pass.
        self.is_pooled = len(self.blocks) == 1
        if not self.is_pooled and config.effective_recursion.routes_by_layer:
            raise ValueError(
                "layers that route by themselves (Mixture-of-Depths) each have keys of other tokens, "
                "which the caches do not keep apart. Use MoRTransformer.generate, which has no cache."
            )
        self.num_heads, self.num_steps = model.num_heads[0], self.blocks[0].router.num_recursions
        self.num_prelude = len(model.prelude.layers)
        self.num_straight = 0 if self.is_pooled else len(self.blocks) * self.num_steps
        num_outer = self.num_prelude + self.num_straight + len(model.coda.layers)
        num_inner = len(self.blocks[0].layers.layers) if self.is_pooled else 0
        self.caches = Caches(model, settings, num_outer, num_inner, has_spare_slot)
        self.policy, self.outer_pages = self.caches.policy, self.caches.outer_pages
        self.unstored: list[Rows] = []
        """Exited tokens whose states the cache policy will store in the next pass."""
        self.are_alone = False
        """Whether the owner knows that no sequence has more than one token in flight."""

    def begin(self, ids: Tensor, slots: Tensor, positions: Tensor, places: Tensor) -> Pool:
        """Run the embedding, the prelude, and the block if it routes no tokens.

        Args:
            ids: the tokens. Those of a slot are adjacent and in order.
            slots: the sequence that each token belongs to.
            positions: position of each token in its text.
            places: position of each token in its span.
        """
        self.products.refresh()
        return self.begin_from(self.model.embedding(ids), slots, positions, places)

    def begin_from(
        self, hidden: Float[Tensor, "t h"], slots: Tensor, positions: Tensor, places: Tensor
    ) -> Pool:
        """Like `begin`, from the states that enter the first layer."""
        if len(slots) and self.outer_pages.num_pages:
            _, rows = self.outer_pages.append(slots, self.are_alone)
            context = self._outer_context(slots, positions, rows)
            begun = hidden = self._stack(self.model.prelude, hidden, context)
            for index in range(self.num_straight):
                number, step = divmod(index, self.num_steps)
                block = self.blocks[number]
                own = replace(context, first_layer=self.num_prelude + index, step=step)
                begun = begun if step else hidden
                entering = block.enter(step, hidden, begun)
                output = block.run_layers(entering[:, None], own)  # [t h] -> [t 1 h]
                everything = RoutingDecision.everything(own.tokens)
                hidden = block.combine(step, hidden[:, None], output, everything, None)[:, 0]
        hidden = self.blocks[0].begin(hidden)
        origin = hidden if self.blocks[0].needs_origin else None
        steps = torch.full_like(slots, self.num_straight)
        rows = Rows.of(hidden, slots, steps, positions, places)
        return Pool.at(0 if self.is_pooled else self.num_steps, self.num_steps, rows, origin)

    def route(self, pool: Pool) -> tuple[Pool, Rows | None]:
        """Split tokens into those that run their next step, and those that exit (None if none do)."""
        plans, gates = list(pool.plans), list(pool.gates)
        hidden, exits = pool.rows.hidden[None], dict[int, Tensor]()  # [t h] -> [1 t h]
        for step, own in pool.parts():
            if step == self.num_steps:  # these tokens have run all steps and exit in any case
                continue
            known = self._known(pool, step, own)
            decision = self.blocks[0].route(hidden[:, own], step, known, True, assess=False)
            plans[step] = None if decision.plan is None else decision.plan[0]
            gates[step] = None if decision.gates is None else decision.gates[0]
            if decision.tokens.is_padding is not None:
                exits[step] = decision.tokens.is_padding[0]
        pool = replace(pool, plans=tuple(plans), gates=tuple(gates))
        # One synchronization with the device for all steps, not one per step.
        answers = iter(torch.cat(list(exits.values())).tolist() if exits else ())
        does_exit: list[bool] = []
        for step, count in enumerate(pool.counts):
            is_asked = step in exits
            does_exit += islice(answers, count) if is_asked else [step == self.num_steps] * count
        if not any(does_exit):
            return pool, None
        index = [i for i, exiting in enumerate(does_exit) if exiting]
        rows = pool.rows.take(torch.tensor(index).to(self.device))
        rows = replace(rows, hidden=self.blocks[0].end(rows.hidden))
        self._note_unstored(rows)
        return pool.take([i for i, exiting in enumerate(does_exit) if not exiting]), rows

    def in_flight(self, pool: Pool) -> tuple[TokensInFlight, TokensInFlight | None]:
        """The tokens that the cache policy must make room for: running ones, and `unstored` ones."""
        exited = _in_flight(Rows.joined(self.unstored)) if self.unstored else None
        return _in_flight(pool.rows, self.are_alone), exited

    def run(self, pool: Pool) -> Pool:
        """Run the block on all tokens in flight. The cache must have room for them."""
        if not len(pool):
            return pool
        block, rows, parts = self.blocks[0], pool.rows, list(pool.parts())
        tokens, exited = self.in_flight(pool)
        entered = self.policy.enter(tokens, exited)
        entering = rows.hidden
        if block.enters_changed:
            entering = torch.cat(
                [block.enter(step, rows.hidden[own], pool.origin_of(own)) for step, own in parts]
            )
        context = self._inner_context(pool, entered, exited)
        output = block.run_layers(entering[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]
        self.unstored = []
        return pool.advanced(self._combined(pool, output), entered.entries)

    def end(
        self, hidden: Float[Tensor, "t h"], slots: Int[Tensor, " t"], positions: Int[Tensor, " t"]
    ) -> Float[Tensor, "t h"]:
        """Run the coda on the final states of tokens that have exited the recursion."""
        if not self.model.coda.layers:
            return hidden
        rows = self.outer_pages.row_of[slots, positions]
        context = self._outer_context(slots, positions, rows)
        context = replace(context, first_layer=self.num_prelude + self.num_straight)
        return self._stack(self.model.coda, hidden, context)

    def logits(self, hidden: Float[Tensor, "t h"]) -> Float[Tensor, "t v"]:
        """The logits after states that `end` returned."""
        normed = self.model.norm(hidden)
        (logits,) = self.products((self.model.output,), normed, None)
        return logits

    def num_stored(self, slot: int, count: int) -> int:
        """How many of the first `count` tokens of a sequence, which have run, have all their rows."""
        waiting = [rows.positions[rows.slots == slot] for rows in self.unstored]
        return min([count, *torch.cat(waiting).tolist()]) if waiting else count

    def drop(self, slot: int) -> None:
        """Remove the keys and values of a sequence, and its exited tokens that are not stored yet."""
        self.unstored = [rows.without(slot) for rows in self.unstored]
        self.caches.release(slot)

    def _inner_context(
        self, pool: Pool, entered: Entered, exited: TokensInFlight | None
    ) -> CachedContext:
        rows, steps = pool.rows, [step for step, _ in pool.parts()]
        return CachedContext(
            steps[0] if len(steps) == 1 else rows.steps[:, None],
            Tokens(rows.positions[:, None], self.settings.max_length),
            self.caches.inner,
            0,
            entered.rows,
            CachedAttention(
                entered.visible, rows.slots, self.caches.inner, self.num_heads, self.are_alone
            ),
            self._exited_states(exited),
            pool.counts[:-1],
            self.policy.projects_alike,
            self.products,
        )

    def _outer_context(self, slots: Tensor, positions: Tensor, rows: Tensor) -> CachedContext:
        visible = Visible(self.outer_pages.row_of, slots, positions + 1)
        attention = CachedAttention(
            visible, slots, self.caches.outer, self.num_heads, self.are_alone
        )
        tokens = Tokens(positions[:, None], self.settings.max_length)
        return CachedContext(
            0, tokens, self.caches.outer, 0, rows, attention, products=self.products
        )

    @staticmethod
    def _stack(stack: DecoderStack, hidden: Tensor, context: CachedContext) -> Tensor:
        return stack(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]

    def _known(self, pool: Pool, step: int, own: slice) -> RoutingDecision:
        """What has been decided about the tokens of a step, as a batch of `t` one-token sequences.

        Tokens of different requests can be routed together, because a causal rule decides about
        each token by itself.
        """
        plan, gates = pool.plans[step], pool.gates[step]
        return RoutingDecision(
            Tokens(pool.rows.batch_of_positions[:, own], self.settings.max_length),
            plan=None if plan is None else plan[None],
            gates=None if gates is None else gates[None],
        )

    def _note_unstored(self, exiting: Rows) -> None:
        if self.policy.keeps_exited and self.is_pooled:
            early = exiting.take((exiting.steps < self.num_steps).nonzero()[:, 0])
            if len(early):
                self.unstored.append(early)

    def _combined(self, pool: Pool, output: Float[Tensor, "t h"]) -> Float[Tensor, "t h"]:
        hidden, output = pool.rows.hidden[None], output[None]  # [t h] -> [1 t h]
        parts = []
        for step, own in pool.parts():
            origin, known = pool.origin_of(own), self._known(pool, step, own)
            origin = None if origin is None else origin[None]
            parts.append(
                self.blocks[0].combine(step, hidden[:, own], output[:, own], known, origin)
            )
        return torch.cat(parts, dim=1)[0]

    def _exited_states(self, exited: TokensInFlight | None) -> Exited | None:
        if exited is None:
            return None
        hidden = Rows.joined(self.unstored).hidden
        tokens = Tokens(exited.positions[:, None], self.settings.max_length)
        return Exited(tokens, hidden[:, None])


def _in_flight(rows: Rows, are_alone: bool = False) -> TokensInFlight:
    """The rows in the form that the cache policy expects."""
    return TokensInFlight(rows.slots, rows.steps, rows.positions, rows.entries, are_alone)
