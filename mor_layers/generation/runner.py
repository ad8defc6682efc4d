"""ModelRunner: runs spans of many sequences through a model with continuous depth-wise batching.

Every tick adds new tokens and runs the shared block once on all tokens in flight. `cached_model`
shows the passes that a token goes through.

Legend: `b` sequences, `t` tokens in flight, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.cache import Caches, CacheSettings
from mor_layers.generation.cached_model import CachedModel
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
        self.model, self.cached = model, CachedModel(model, settings, products, compiler)
        self.prefixes = PrefixCache(self.cached)
        embedding, device = model.embedding.weight, self.cached.device
        nowhere = torch.zeros(4, 0, dtype=torch.long, device=device)
        nobody = Rows.of(embedding.detach()[:0], *nowhere)
        self._waiting = Pool.at(0, self.cached.num_steps, nobody)  # for their next step
        self._through: list[Rows] = []  # tokens that exit in this tick
        self._spans: dict[int, Span] = {}
        self._left = torch.zeros(settings.num_slots, dtype=torch.long, device=device)
        size = (settings.num_slots, max_span)
        self._final = torch.zeros(*size, embedding.shape[1], dtype=embedding.dtype).to(device)
        self._depths = torch.zeros(size, dtype=torch.long, device=device)

    @property
    def caches(self) -> Caches:
        return self.cached.caches

    @torch.inference_mode()
    @named("mor/tick")
    def tick(self, spans: list[Span], make_room: Callable[[], int]) -> Finished:
        """Add spans, and run every token in flight once through the block.

        Args:
            spans: the spans to add. Their slots must have no other span in flight.
            make_room: called when pages run out. It takes out a sequence and returns its slot.
        """
        entering = self._route(self._enter(spans, make_room))
        pool = self._fit(self._waiting.behind(entering), make_room)
        self._waiting = self._route(self.cached.run(pool))
        self._note_exits()
        return self._leave()

    def drop(self, slot: int) -> None:
        """Remove a sequence with its tokens in flight, its keys and its values."""
        self._spans.pop(slot, None)
        self._left[slot] = 0
        self._waiting = self._waiting.without(slot)
        self._through = [rows.without(slot) for rows in self._through]
        self.prefixes.keep(slot)
        self.cached.drop(slot)
        self.prefixes.leave(slot)

    def _enter(self, spans: list[Span], make_room: Callable[[], int]) -> Pool:
        """Run the embedding and the prelude, and all other layers if the model routes no tokens."""
        outer_pages = self.caches.outer_pages
        while True:
            slots, positions, places = self._places(spans)
            if not outer_pages.num_pages or outer_pages.fits(slots):
                break
            slot = make_room()
            self.drop(slot)
            spans = [span for span in spans if span.slot != slot]
        for span in spans:
            self._spans[span.slot] = span
        self.cached.are_alone = all(len(span.ids) == 1 for span in self._spans.values())
        self._left.index_add_(0, slots, torch.ones_like(slots))
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
        while len(pool) and not self.caches.policy.fits(*self.cached.in_flight(pool)):
            slot = make_room()
            self.drop(slot)
            pool = pool.without(slot)
        return pool

    def _leave(self) -> Finished:
        """Run the coda on the spans whose tokens have all exited, and compute their logits."""
        left = self._left.tolist()
        spans = [span for slot, span in self._spans.items() if left[slot] == 0]
        spans.sort(key=lambda span: not span.is_last)
        vocabulary = self.model.config.vocab_size
        if not spans:
            return Finished([], self._final.new_zeros(0, vocabulary))
        for span in spans:
            del self._spans[span.slot]
        slots, positions, places = self._places(spans)
        hidden = self.cached.end(self._final[slots, places], slots, positions)
        depths = iter(self._depths[slots, places].tolist())
        ends = list(accumulate(len(span.ids) for span in spans))
        finished = [
            FinishedSpan(
                span,
                list(islice(depths, len(span.ids))),
                self.cached.logits(hidden[end - len(span.ids) : end])
                if span.needs_all_logits
                else None,
            )
            for span, end in zip(spans, ends, strict=True)
        ]
        last = [end - 1 for span, end in zip(spans, ends, strict=True) if span.is_last]
        index = torch.tensor(last, dtype=torch.long).to(self.cached.device)
        return Finished(finished, self.cached.logits(hidden[index]))
