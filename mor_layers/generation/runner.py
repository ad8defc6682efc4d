"""ModelRunner: runs spans of many sequences through a model with continuous depth-wise batching.

Every tick adds new tokens and runs the shared block once on all tokens in flight, or, of several
recursions, the block of each. `cached_model` shows the passes that a token goes through, and `chain` how
several recursions follow one another.

Legend: `b` sequences, `t` tokens in flight, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.cache import CacheSettings
from mor_layers.generation.cached_model import CachedModel
from mor_layers.generation.chain import cached_chain, caches_of
from mor_layers.generation.in_flight import Pool, Rows
from mor_layers.generation.prefixes import PrefixCache
from mor_layers.generation.products import PackedProducts, Products
from mor_layers.generation.scheduling import Span
from mor_layers.generation.static_block import Backend
from mor_layers.models import MoRTransformer
from mor_layers.profiling import named


@dataclass(frozen=True)
class FinishedSpan:
    """A span that has run the whole model."""

    span: Span
    depths: list[int]
    """Number of steps that each token of the span took."""
    logits: Float[Tensor, "t v"] | None = None
    """Logits after each token of the span, if it needs all of them."""


@dataclass(frozen=True)
class Finished:
    """The spans that finished in a tick."""

    spans: list[FinishedSpan]
    """The spans with `is_last` come first, because only these have a row in `logits`."""
    logits: Float[Tensor, "b v"]
    """Logits of the next token, one row for each span with `is_last`."""


@dataclass(frozen=True)
class _Left:
    """Spans that have run all layers of a link."""

    spans: list[Span]
    hidden: Float[Tensor, "t h"]
    """States of their tokens."""
    depths: list[int]
    """Number of steps that each token took."""


class ModelRunner:
    """A model with its caches and the spans in flight.

    Args:
        model: the model, on the device and in the precision to use. It is put into evaluation mode.
        settings: size and layout of the caches.
        max_span: largest number of tokens in a span.
        packs_weights: whether to compute with copies of the weights, see `products`.
        compiler: backend of `torch.compile` for the layers of the recursion, see `static_block`.

    Raises:
        ValueError: `kv_bytes` is less than one page, or the experts drop tokens.
    """

    def __init__(
        self,
        model: MoRTransformer,
        settings: CacheSettings,
        max_span: int,
        packs_weights: bool = False,
        compiler: Backend | None = None,
    ) -> None:
        products = PackedProducts(model) if packs_weights else Products()
        chain = cached_chain(model, settings, products, compiler)
        self.model, self.cached = model, chain[0]
        self.caches = caches_of(chain, settings)
        self.prefixes = PrefixCache(self.cached)
        self._links = [_Link(cached, max_span) for cached in chain]
        self._depths: dict[int, list[int]] = {}
        """By slot, the steps that the tokens of its span took in the links that it has left."""

    @torch.inference_mode()
    @named("mor/tick")
    def tick(self, spans: list[Span], make_room: Callable[[], int]) -> Finished:
        """Add spans, and run every token in flight once through the block of its recursion.

        Args:
            spans: the spans to add. Their slots must have no other span in flight.
            make_room: called when pages run out. It takes out a sequence and returns its slot.
        """

        def drop_one() -> int:
            slot = make_room()
            self.drop(slot)
            return slot

        left = self._links[0].tick(spans, None, drop_one)
        for link in self._links[1:]:
            self._note_depths(left)
            left = link.tick(left.spans, left.hidden, drop_one)
        return self._finished(left)

    def drop(self, slot: int) -> None:
        """Remove a sequence with its tokens in flight, its keys and its values."""
        self._depths.pop(slot, None)
        for link in self._links:
            link.forget(slot)
        self.prefixes.keep(slot)
        for link in self._links:
            link.cached.drop(slot)
        self.prefixes.leave(slot)

    def _note_depths(self, left: _Left) -> None:
        """Store the depths of the tokens of spans that go on to the next link."""
        depths = iter(left.depths)
        for span in left.spans:
            own = list(islice(depths, len(span.ids)))
            before = self._depths.get(span.slot, [0] * len(own))
            self._depths[span.slot] = [a + b for a, b in zip(before, own, strict=True)]

    def _finished(self, left: _Left) -> Finished:
        """Compute the logits of spans that have left the last link."""
        cached, spans, hidden = self._links[-1].cached, left.spans, left.hidden
        if not spans:
            return Finished([], hidden.new_zeros(0, self.model.config.vocab_size))
        self._note_depths(left)
        ends = list(accumulate(len(span.ids) for span in spans))
        finished = [
            FinishedSpan(
                span,
                self._depths.pop(span.slot),
                cached.logits(hidden[end - len(span.ids) : end]) if span.needs_all_logits else None,
            )
            for span, end in zip(spans, ends, strict=True)
        ]
        last = [end - 1 for span, end in zip(spans, ends, strict=True) if span.is_last]
        index = torch.tensor(last, dtype=torch.long).to(cached.device)
        return Finished(finished, cached.logits(hidden[index]))


class _Link:
    """One recursion of the model, the layers around it, and the spans in flight there."""

    def __init__(self, cached: CachedModel, max_span: int) -> None:
        self.cached = cached
        embedding, device = cached.model.embedding.weight, cached.device
        nowhere = torch.zeros(4, 0, dtype=torch.long, device=device)
        nobody = Rows.of(embedding.detach()[:0], *nowhere)
        self._waiting = Pool.at(0, cached.num_steps, nobody)  # for their next step
        self._through: list[Rows] = []  # tokens that exit in this tick
        self._spans: dict[int, Span] = {}
        num_slots = cached.settings.num_slots
        self._left = torch.zeros(num_slots, dtype=torch.long, device=device)
        size = (num_slots, max_span)
        self._final = torch.zeros(*size, embedding.shape[1], dtype=embedding.dtype).to(device)
        self._depths = torch.zeros(size, dtype=torch.long, device=device)

    def tick(self, spans: list[Span], hidden: Tensor | None, make_room: Callable[[], int]) -> _Left:
        """Add spans, run every token in flight once through the block, and return spans that are done.

        Args:
            hidden: states of the tokens of the spans, `[t h]`; None to embed them.
            make_room: called when pages run out. It removes a sequence, here too, and returns its slot.
        """
        entering = self._route(self._enter(spans, hidden, make_room))
        pool = self._fit(self._waiting.behind(entering), make_room)
        self._waiting = self._route(self.cached.run(pool))
        self._note_exits()
        return self._leave()

    def forget(self, slot: int) -> None:
        """Remove the tokens in flight of a sequence."""
        self._spans.pop(slot, None)
        self._left[slot] = 0
        self._waiting = self._waiting.without(slot)
        self._through = [rows.without(slot) for rows in self._through]

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
        for span in spans:
            self._spans[span.slot] = span
        self.cached.are_alone = all(len(span.ids) == 1 for span in self._spans.values())
        self._left.index_add_(0, slots, torch.ones_like(slots))
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
        self._final[rows.slots, rows.places] = rows.hidden
        self._depths[rows.slots, rows.places] = rows.steps
        self._left.index_add_(0, rows.slots, -torch.ones_like(rows.slots))

    def _fit(self, pool: Pool, make_room: Callable[[], int]) -> Pool:
        """Take out sequences until the cache has room for the tokens of all others."""
        while len(pool) and not self.cached.policy.fits(*self.cached.in_flight(pool)):
            pool = pool.without(make_room())
        return pool

    def _leave(self) -> _Left:
        """Run the layers after the recursion on the spans whose tokens have all exited."""
        left = self._left.tolist() if self._spans else []
        spans = [span for slot, span in self._spans.items() if left[slot] == 0]
        if not spans:
            return _Left([], self._final.new_zeros(0, self._final.shape[2]), [])
        spans.sort(key=lambda span: not span.is_last)
        for span in spans:
            del self._spans[span.slot]
        slots, positions, places = self._places(spans)
        hidden = self.cached.end(self._final[slots, places], slots, positions)
        return _Left(spans, hidden, self._depths[slots, places].tolist())
