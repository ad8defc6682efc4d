"""ModelRunner: runs spans of many sequences through a model with continuous depth-wise batching.

Every tick adds new tokens and runs the shared block once on all tokens in flight, or, of several
recursions, the block of each. `cached_model` shows the passes that a token goes through, and `chain` how
several recursions follow one another.

Legend: `b` sequences, `t` tokens in flight, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.cache import CacheSettings
from mor_layers.generation.prefixes import PrefixCache
from mor_layers.generation.products import PackedProducts, Products
from mor_layers.generation.scheduling import Span
from mor_layers.generation.tick.chain import cached_chain, caches_of
from mor_layers.generation.tick.graph import Backend
from mor_layers.generation.tick.link import Left, Link, Next
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
    chosen: Next | None = None
    """The next token, if a graph chose it."""

    @property
    def needs_token(self) -> bool:
        """Whether the host must choose the next token."""
        return self.span.is_last and self.chosen is None


@dataclass(frozen=True)
class Finished:
    """The spans that finished in a tick."""

    spans: list[FinishedSpan]
    """The spans with `is_last` come first."""
    logits: Float[Tensor, "b v"]
    """Logits of the next token, one row for each span that `needs_token`."""


class ModelRunner:
    """A model with its caches and the spans in flight.

    Args:
        model: the model, on the device and in the precision to use. It is put into evaluation mode.
        settings: size and layout of the caches.
        max_span: largest number of tokens in a span.
        packs_weights: whether to compute with copies of the weights, see `products`.
        compiler: backend of `torch.compile` for ticks as one graph, see `graph`.

    Raises:
        ValueError: `kv_bytes` is less than one page, the experts drop tokens, or the model cannot be
            compiled.
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
        chain = cached_chain(model, settings, products, has_spare_slot=compiler is not None)
        self.model, self.cached = model, chain[0]
        self.caches = caches_of(chain, settings)
        self.prefixes = PrefixCache(self.cached)
        self.links = [
            Link(cached, max_span, compiler, is_last=cached is chain[-1]) for cached in chain
        ]
        self._depths: dict[int, list[int]] = {}
        """By slot, the steps that the tokens of its span took in the links that it has left."""

    @property
    def num_recorded(self) -> int:
        """Number of CUDA graphs that ticks have been recorded as."""
        return sum(link.static.num_recorded for link in self.links if link.static is not None)

    @property
    def chooses_tokens(self) -> bool:
        """Whether sequences can go on without the host, see `Continuation`."""
        return len(self.links) == 1 and self.links[0].static is not None

    @property
    def num_started(self) -> int:
        """Ticks that have started and not finished."""
        return self.links[0].num_started

    @property
    def num_following(self) -> int:
        """Tokens that enter the next tick without being given to it, at most."""
        return self.links[0].num_following

    def can_start(self, num_entering: int) -> bool:
        """Whether a further tick can start although one has not finished.

        Nothing else but `start` and `finish` may be called then.

        Args:
            num_entering: tokens that enter, at most.
        """
        return self.chooses_tokens and self.links[0].can_start(num_entering)

    @torch.inference_mode()
    @named("mor/tick")
    def start(self, spans: list[Span], make_room: Callable[[], int]) -> None:
        """Add spans, and run every token in flight once through the block of its recursion.

        Args:
            spans: the spans to add. Their slots must have no other span in flight.
            make_room: called when pages run out. It takes out a sequence and returns its slot.
        """
        self.links[0].start(spans, None, partial(self._drop_one, make_room))

    @torch.inference_mode()
    def finish(self, make_room: Callable[[], int]) -> Finished:
        """Wait for the first of the ticks that have started, and return the spans that are done.

        Args:
            make_room: as for `start`.
        """
        left = self.links[0].finish()
        for link in self.links[1:]:
            self._note_depths(left)
            left = link.tick(left.spans, left.hidden, partial(self._drop_one, make_room))
        return self._finished(left)

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Remove a sequence with its tokens in flight, its keys and its values."""
        self._depths.pop(slot, None)
        for link in self.links:
            link.forget(slot)
        self.prefixes.keep(slot)
        for link in self.links:
            link.cached.drop(slot)
        self.prefixes.leave(slot)

    def _drop_one(self, make_room: Callable[[], int]) -> int:
        slot = make_room()
        self.drop(slot)
        return slot

    def _note_depths(self, left: Left) -> None:
        """Store the depths of the tokens of spans that go on to the next link."""
        depths = iter(left.depths)
        for span in left.spans:
            own = list(islice(depths, len(span.ids)))
            before = self._depths.get(span.slot, [0] * len(own))
            self._depths[span.slot] = [a + b for a, b in zip(before, own, strict=True)]

    def _finished(self, left: Left) -> Finished:
        """Compute the logits of spans that have left the last link."""
        cached, spans, hidden = self.links[-1].cached, left.spans, left.hidden
        if not spans:
            return Finished([], hidden.new_zeros(0, self.model.config.vocab_size))
        self._note_depths(left)
        ends = list(accumulate(len(span.ids) for span in spans))
        finished = [
            FinishedSpan(
                span,
                self._depths.pop(span.slot),
                cached.logits(hidden[end - len(span.ids) : end]) if span.needs_all_logits else None,
                left.chosen.get(span.slot),
            )
            for span, end in zip(spans, ends, strict=True)
        ]
        last = [end - 1 for own, end in zip(finished, ends, strict=True) if own.needs_token]
        if left.logits is not None and len(last) == len(hidden):
            return Finished(finished, left.logits)
        if not last:
            return Finished(finished, hidden.new_zeros(0, self.model.config.vocab_size))
        index = torch.tensor(last, dtype=torch.long).to(cached.device)
        if left.logits is not None:
            return Finished(finished, left.logits[index])
        return Finished(finished, cached.logits(hidden[index]))
