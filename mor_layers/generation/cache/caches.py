"""The memory of a generating model: two kinds of rows that share one budget of bytes.

Layers that run once keep a row for every token, and the recursion keeps what its policy requires. Memory
is divided so that both are expected to run out at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from mor_layers.generation.cache.memory import EightBits, KVArena, PagedRows
from mor_layers.generation.cache.policies import CACHE_POLICIES
from mor_layers.models import MoRTransformer

PrefixSharing = Literal["off", "client", "all"]
"""Which requests share the rows of equal prefixes."""


@dataclass(frozen=True)
class CacheSettings:
    """Size and layout of the cache of a generating model."""

    kv_bytes: int
    """Bytes for keys and values, rounded down to whole pages and allocated at once."""
    num_slots: int = 64
    """Largest number of sequences in flight."""
    max_length: int = 2048
    """Largest length of a sequence, prompt and continuation together."""
    page_size: int = 16
    """Number of rows by which a list grows."""
    is_int8: bool = False
    """Store 8-bit integers with one fp32 scale per head. Not exact."""
    shares: tuple[float, ...] | None = None
    """Expected share of tokens at each step, of several recursions at those of one after another, which
    determines how memory is divided and how many requests are admitted. Default: from the router's
    settings, or all tokens if these do not say."""
    prefix_sharing: PrefixSharing = "client"
    """Which requests of an engine share the rows of tokens that they begin with: those of one
    `client`, so that no client can find out by timing what another one has sent; `all`; or none
    (`off`)."""
    is_fp8: bool = False
    """Store 8-bit floating point (E4M3) with one fp32 scale per head. Not exact. Not with `is_int8`."""

    def __post_init__(self) -> None:
        for name in ("kv_bytes", "num_slots", "max_length", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.is_int8 and self.is_fp8:
            raise ValueError("is_int8=True and is_fp8=True: rows have one format. Use one of them.")
        if self.prefix_sharing not in get_args(PrefixSharing):
            raise ValueError(
                f"prefix_sharing={self.prefix_sharing!r} must be one of "
                f"{', '.join(map(repr, get_args(PrefixSharing)))}."
            )

    @property
    def eight_bits(self) -> EightBits | None:
        """The format of rows of 8-bit numbers; None if they are stored as the model computes them."""
        return "fp8" if self.is_fp8 else "int8" if self.is_int8 else None

    @classmethod
    def for_all_steps(
        cls,
        model: MoRTransformer,
        max_length: int,
        num_slots: int = 1,
        is_int8: bool = False,
        is_fp8: bool = False,
    ) -> Self:
        """Enough memory for every token of `num_slots` texts to run every step, so it cannot run out."""
        config, dtype = model.config, model.embedding.weight.dtype
        layers, page = config.num_unrolled_layers, cls.page_size
        heads, size, vectors = kept_of(model)
        eight_bits = "int8" if is_int8 or is_fp8 else None  # both take as much
        row = KVArena.bytes_per_row(layers, heads, size, dtype, eight_bits, vectors)
        # Each list may end within a page, and so may the division of the memory.
        kv_bytes = (num_slots * (max_length + page) + page) * row
        shares = (1.0,) * len(expected_shares(model))
        return cls(kv_bytes, num_slots, max_length, is_int8=is_int8, is_fp8=is_fp8, shares=shares)


class Caches:
    """Keys and values of all sequences in flight.

    Args:
        model: the model whose layers use them.
        num_outer: number of layers that run once.
        num_inner: number of layers of the shared block; 0 if nothing is routed.
        has_spare_slot: whether there is one more slot than sequences, for rows of a graph that hold no
            token. It occupies no pages.

    Raises:
        ValueError: the memory is too small for a single page, or `shares` has another length.
    """

    def __init__(
        self,
        model: MoRTransformer,
        settings: CacheSettings,
        num_outer: int,
        num_inner: int,
        has_spare_slot: bool = False,
    ) -> None:
        weight = model.embedding.weight
        recursion = model.config.effective_recursion
        steps, kind = recursion.num_recursions, CACHE_POLICIES[recursion.kv_policy]
        self.settings, self.shares = settings, settings.shares or expected_shares(model)
        if len(self.shares) != steps:
            raise ValueError(f"shares={self.shares} must have {steps} entries, one per step.")
        (heads, size, vectors), page = kept_of(model), settings.page_size
        outer_bytes, inner_bytes = (
            page
            * KVArena.bytes_per_row(layers, heads, size, weight.dtype, settings.eight_bits, vectors)
            for layers in (num_outer, num_inner)
        )
        inner_rows = sum(kind.rows_for(self.shares, 1.0))
        page_of_tokens = outer_bytes + inner_bytes * inner_rows
        num_outer_pages = int(settings.kv_bytes / page_of_tokens) if num_outer else 0
        rest = settings.kv_bytes - num_outer_pages * outer_bytes
        num_inner_pages = rest // inner_bytes if num_inner else 0
        if (num_outer and not num_outer_pages) or (num_inner and not num_inner_pages):
            raise ValueError(
                f"kv_bytes={settings.kv_bytes} is less than one page of {page} tokens, "
                f"{int(page_of_tokens) + 1} bytes. Increase kv_bytes or decrease page_size."
            )
        self.outer, self.inner = (
            KVArena(
                layers,
                pages * page,
                heads,
                size,
                weight.dtype,
                weight.device,
                settings.eight_bits,
                vectors,
            )
            for layers, pages in ((num_outer, num_outer_pages), (num_inner, num_inner_pages))
        )
        slots, length = settings.num_slots + has_spare_slot, settings.max_length
        self.outer_pages = PagedRows(num_outer_pages, page, slots, length, weight.device)
        """A list for each slot: rows of the layers that run once."""
        self.policy = kind(slots, steps, num_inner_pages, page, length, weight.device)
        """Rows of the recursion."""

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.outer.num_bytes + self.inner.num_bytes

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of the pages that sequences use."""
        return self._bytes_of(self.outer_pages.pages_in_use, self.policy.pages.pages_in_use)

    @property
    def num_bytes_idle(self) -> int:
        """Bytes of the pages that keep prefixes and that no sequence uses."""
        return self._bytes_of(self.outer_pages.num_idle, self.policy.pages.num_idle)

    @property
    def pages(self) -> tuple[int, int]:
        """Number of pages for the layers that run once, and for the recursion."""
        return self.outer_pages.num_pages, self.policy.pages.num_pages

    @property
    def pages_free(self) -> tuple[int, int]:
        return self.outer_pages.pages_free, self.policy.pages.pages_free

    def demand(self, length: int) -> tuple[int, int]:
        """Number of pages that a sequence is expected to need."""
        outer = self.outer_pages.pages_for(length) if self.outer_pages.num_pages else 0
        if not self.policy.pages.num_pages:
            return outer, 0
        rows = self.policy.rows_for(tuple(share * length for share in self.shares), length)
        return outer, sum(self.policy.pages.pages_for(round(count)) for count in rows)

    def tables(self, slot: int) -> list[Tensor]:
        """The rows that a sequence sees, as tables of `[m]`: of the layers that run once, if there
        are any, then those of the policy, if anything is routed. May be written to."""
        outer = [self.outer_pages.row_of[slot]] if self.outer_pages.num_pages else []
        return outer + (list(self.policy.tables(slot)) if self.policy.pages.num_pages else [])

    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        """Number of entries of each of the `tables` for tokens that ran so many steps each."""
        outer = (len(depths),) if self.outer_pages.num_pages else ()
        return outer + (self.policy.num_entries(depths) if self.policy.pages.num_pages else ())

    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        """Let a sequence without rows of its own begin with those that are in its tables."""
        num_outer = int(self.outer_pages.num_pages > 0)
        if num_outer:
            device = self.outer.data.device
            counts = torch.tensor(lengths[:1], device=device)
            self.outer_pages.borrow(torch.tensor([slot], device=device), counts)
        if self.policy.pages.num_pages:
            self.policy.borrow(slot, lengths[num_outer:])

    def _bytes_of(self, *counts: int) -> int:
        """Bytes of so many pages of each kind."""
        arenas = ((self.outer, self.outer_pages), (self.inner, self.policy.pages))
        return sum(
            arena.num_bytes // pages.num_pages * count
            for (arena, pages), count in zip(arenas, counts, strict=True)
            if pages.num_pages
        )

    def release(self, slot: int) -> None:
        """Remove the sequence in a slot."""
        self.policy.release(slot)
        self.outer_pages.release(torch.tensor([slot], device=self.outer.data.device))


def bytes_per_token(model: MoRTransformer, shares: tuple[float, ...] | None = None) -> float:
    """What a token is expected to keep in a model with one recursion, relative to other models.

    Args:
        shares: of the tokens that run each step. Default: as `CacheSettings.shares`.
    """
    recursion, schedule = model.config.effective_recursion, model.config.schedule
    if not schedule.is_cyclic:
        return schedule.num_unrolled_layers
    rows = CACHE_POLICIES[recursion.kv_policy].rows_for(shares or expected_shares(model), 1.0)
    return schedule.num_unshared + schedule.block_size * sum(rows)


def kept_of(model: MoRTransformer) -> tuple[int, int, int]:
    """What this rank keeps of a token in each layer: heads, their size, and vectors of each."""
    _, size = model.config.cached_heads
    return model.num_heads[1], size, 2 if model.config.latent_attention is None else 1


def expected_shares(model: MoRTransformer) -> tuple[float, ...]:
    """Share of tokens that the routers' settings admit to each step; 1 if unknown."""
    shares: list[float] = []
    for recursion in model.config.recursions:
        steps = recursion.num_recursions
        shares += recursion.router.capacity_factors_for(steps) or (1.0,) * steps
    return tuple(shares) or (1.0,)
