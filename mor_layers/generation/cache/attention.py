"""Attention of tokens in flight to rows of a cache, without a loop over sequences.

Three implementations give the same result. `PagedAttention` is a kernel that a C++
compiler makes for the processor at hand: tokens read rows in place, in any format of the cache. It is
used on CPUs wherever there is a compiler, for single tokens and for chunks of a prompt. The others
consist of operations of PyTorch. `IndexedAttention` reads rows in place, too: a sparse pattern names
those whose products with the queries are the scores, and whose values are summed. It takes the kernel's
place for single tokens, in up to twice its time, or many times it where rows have fewer than 32 bits
and are expanded first. `GatheredAttention` copies rows into a rectangle for
`scaled_dot_product_attention`. It takes the kernel's place for chunks, whose many queries share the
copy, and it is used for everything on other devices.

Legend: `t` tokens in flight, `c` spans (runs of tokens of one sequence), `q` queries of the longest
span, `n` query heads, `g` key-value heads, `d` head size, `m` rows seen, `z` all scores.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.cpu_kernels import attends_to, paged_attention
from mor_layers.generation.cache.memory import KVArena
from mor_layers.generation.cache.policies import Visible
from mor_layers.recursion import Exited, Products, StepContext

MIN_GATHERED_QUERIES = 4
"""From this number of tokens of one sequence on, copying its rows is faster than reading them again."""


class PagedAttention:
    """Every token reads its own list of rows in place. For CPUs with a C++ compiler.

    Args:
        visible: the rows that each token sees. A token that sees none gets zeros.
    """

    def __init__(self, visible: Visible) -> None:
        self.table = visible.table
        self.lists, self.counts = visible.lists.contiguous(), visible.counts.contiguous()

    def __call__(
        self, arena: KVArena, layer: int, query: Float[Tensor, "t n d"]
    ) -> Float[Tensor, "t n d"]:
        data, scales = arena.layer(layer)
        return paged_attention(query, data, scales, self.table, self.lists, self.counts)


def is_read_by_kernel(arena: KVArena) -> bool:
    """Whether `PagedAttention` reads an arena."""
    return attends_to(arena.layer(0)[0], arena.dtype)


class IndexedAttention:
    """Every token reads its own list of rows in place. For CPUs.

    Products with a sparse pattern need single or double precision. Rows of less are computed with in
    single precision.

    Args:
        visible: the rows that each token sees.
        num_heads: query heads.
    """

    def __init__(self, visible: Visible, arena: KVArena, num_heads: int) -> None:
        num_kv_heads, tn = arena.data.shape[3], len(visible.lists) * num_heads
        per_row = arena.num_vectors * num_kv_heads
        counts, longest = visible.counts, int(visible.counts.max())
        table = visible.table.index_select(0, visible.lists)[:, :longest]
        self.expanded, num_rows = None, arena.data.shape[1]
        dtype = torch.promote_types(arena.dtype, torch.float32)
        if arena.data.dtype != dtype:
            is_row = torch.arange(longest) < counts[:, None]  # [t m]
            self.expanded = _ExpandedRows(arena, table[is_row], dtype)
            num_rows = len(self.expanded.rows)
            table = (is_row.flatten().cumsum(0) - 1).view_as(is_row)
        # The vectors of a row are its g keys, then its g values. A group of query heads shares one.
        # A token's heads follow one another, so that they find its rows in the processor's cache.
        num_vectors = num_rows * per_row
        index = torch.int32 if num_vectors < 2**31 else torch.int64
        head = _key_of_each_head(num_heads, num_kv_heads, index)
        vectors = table[:, None].to(index) * per_row + head  # [t n m]
        counts = counts.repeat_interleave(num_heads)  # [tn]
        bounds = F.pad(counts.cumsum(0), (1, 0))
        # In the rectangle, what precedes the scores of a row also has the unused entries above it.
        unused = torch.arange(0, tn * longest, longest) - bounds[:-1]
        self.places = unused.repeat_interleave(counts)
        self.places += torch.arange(len(self.places))  # [z]
        self.keys = vectors.flatten().index_select(0, self.places)
        self.values = self.keys + (per_row - num_kv_heads)  # the same where a row is both
        bounds = bounds.to(index)
        self.begins = bounds[:-1]
        self.scores = torch.full((tn, longest), -torch.inf, dtype=dtype)
        self.pattern = _pattern(bounds, self.keys, num_vectors, dtype)

    def __call__(
        self, arena: KVArena, layer: int, query: Float[Tensor, "t n d"]
    ) -> Float[Tensor, "t n d"]:
        vectors = arena.vectors(layer) if self.expanded is None else self.expanded(arena, layer)
        torch.sparse.sampled_addmm(
            self.pattern,
            query.flatten(0, 1).to(vectors.dtype),
            vectors.T,
            beta=0.0,
            alpha=1.0 / math.sqrt(query.shape[-1]),
            out=self.pattern,
        )
        # Rows of unequal length share a rectangle for the softmax; unused entries stay at -inf.
        self.scores.view(-1).index_copy_(0, self.places, self.pattern.values())
        weights = self.scores.softmax(dim=-1).view(-1).index_select(0, self.places)
        out = F.embedding_bag(
            self.values,
            vectors,
            self.begins,
            mode="sum",
            per_sample_weights=weights,
        )
        return out.view_as(query).to(query.dtype)


class _ExpandedRows:
    """Copies of some rows in a wider precision.

    All layers of a tick share the memory, because new memory for each costs more than the copying.
    """

    def __init__(self, arena: KVArena, rows: Int[Tensor, " t"], dtype: torch.dtype) -> None:
        self.rows, shape = rows, (len(rows), *arena.data.shape[2:])
        self.stored = torch.empty(shape, dtype=arena.data.dtype)
        self.wide = torch.empty(shape, dtype=dtype)

    def __call__(self, arena: KVArena, layer: int) -> Float[Tensor, "v d"]:
        torch.index_select(arena.data[layer], 0, self.rows, out=self.stored)
        if arena.scales is None:
            self.wide.copy_(self.stored)
        else:
            scales = arena.scales[layer].index_select(0, self.rows)
            arena.dequantized(self.stored, scales, out=self.wide)
        return self.wide.flatten(0, 2)


@cache
def _key_of_each_head(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> Int[Tensor, "n 1"]:
    """Which key head each query head reads."""
    return torch.arange(num_heads, dtype=dtype)[:, None] // (num_heads // num_kv_heads)


def _pattern(bounds: Tensor, columns: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    _announce_sparse()
    return torch.sparse_csr_tensor(
        bounds,
        columns,
        torch.zeros(len(columns), dtype=dtype),
        size=(len(bounds) - 1, num_columns),
        check_invariants=False,
    )


@cache
def _announce_sparse() -> None:
    """Let PyTorch say, unheard, that sparse tensors are in beta, which it says once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        bounds, nothing = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        values = torch.zeros(0)
        torch.sparse_csr_tensor(bounds, nothing, values, size=(0, 0), check_invariants=False)


class GatheredAttention:
    """Spans of tokens read a copy of their sequence's rows.

    Args:
        visible: the rows that each token sees; the tokens of a span see the same list.
        lengths: number of tokens in each span; the spans are consecutive.
    """

    def __init__(self, visible: Visible, lengths: Int[Tensor, " c"]) -> None:
        device = lengths.device
        self.num_spans, widest = len(lengths), int(lengths.max())
        longest = int(visible.counts.max())
        first = lengths.cumsum(0) - lengths
        place = torch.arange(widest, device=device)
        is_token = place < lengths[:, None]  # [c q]
        # Queries beyond a span's end repeat its last token.
        self.tokens = first[:, None] + torch.minimum(place, lengths[:, None] - 1)
        self.outputs = is_token.flatten().nonzero()[:, 0]
        table = visible.table[visible.lists[first], :longest]
        counts = visible.counts[self.tokens]
        self.mask = (torch.arange(longest, device=device) < counts[..., None])[:, None]
        # Rows that no query of a span sees are undefined; any valid row takes their place.
        is_seen = torch.arange(longest, device=device) < counts.amax(dim=1)[:, None]
        self.rows = torch.where(is_seen, table, table[:, :1]).flatten()

    def __call__(
        self, arena: KVArena, layer: int, query: Float[Tensor, "t n d"]
    ) -> Float[Tensor, "t n d"]:
        rows = arena.gather(layer, self.rows).unflatten(0, (self.num_spans, -1))
        vectors = rows.permute(2, 0, 3, 1, 4)  # [c m p g d] -> [p c g m d]
        key, value = vectors[0], vectors[-1]  # the same where a row is both
        spans = query[self.tokens].transpose(1, 2)  # [c q n d] -> [c n q d]
        mask, group = self.mask, query.shape[1] // key.shape[1]
        if spans.shape[2] == 1:  # heads that share a key take the place of queries
            spans, group = spans.unflatten(1, (-1, group)).squeeze(3), 1
        out = F.scaled_dot_product_attention(
            spans, key, value, attn_mask=mask, enable_gqa=group > 1
        )
        if len(query) == self.num_spans:
            return out.reshape(query.shape)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.outputs)


class CachedAttention:
    """Chooses one of the implementations for each token in flight.

    Args:
        visible: the rows that each token sees.
        slots: the sequence that each token belongs to; equal ones are adjacent.
        num_heads: query heads.
        are_alone: whether it is known that no slot has more than one of the tokens.
    """

    parts: list[tuple[Tensor | None, PagedAttention | IndexedAttention | GatheredAttention]]

    def __init__(
        self,
        visible: Visible,
        slots: Int[Tensor, " t"],
        arena: KVArena,
        num_heads: int,
        are_alone: bool = False,
    ) -> None:
        if is_read_by_kernel(arena):
            self.parts = [(None, PagedAttention(visible))]
            return
        is_indexable = arena.data.device.type == "cpu"
        if is_indexable and (are_alone or bool((slots[1:] != slots[:-1]).all())):  # the common case
            self.parts = [(None, IndexedAttention(visible, arena, num_heads))]
            return
        _, lengths = slots.unique_consecutive(return_counts=True)
        is_single = lengths < (MIN_GATHERED_QUERIES if is_indexable else 2)
        self.parts = []
        for wanted in (True, False):
            spans = is_single == wanted
            if not bool(spans.any()):
                continue
            is_all = bool(spans.all())
            tokens = None if is_all else spans.repeat_interleave(lengths).nonzero()[:, 0]
            part = visible if tokens is None else _subset(visible, tokens)
            if wanted and is_indexable:
                self.parts.append((tokens, IndexedAttention(part, arena, num_heads)))
            else:
                self.parts.append((tokens, GatheredAttention(part, lengths[spans])))

    def __call__(
        self, arena: KVArena, layer: int, query: Float[Tensor, "t n d"]
    ) -> Float[Tensor, "t n d"]:
        out = None
        for tokens, attention in self.parts:
            if tokens is None:
                return attention(arena, layer, query)
            out = torch.empty_like(query) if out is None else out
            out.index_copy_(0, tokens, attention(arena, layer, query.index_select(0, tokens)))
        assert out is not None
        return out


def _subset(visible: Visible, tokens: Tensor) -> Visible:
    return Visible(visible.table, visible.lists[tokens], visible.counts[tokens])


@dataclass(frozen=True)
class CachedContext(StepContext):
    """What layers know about tokens in flight, `[t 1 h]`, each of which has its own step."""

    step: Int[Tensor, "t 1"] | int  # type: ignore[assignment]
    """An int where all tokens are at the same step."""
    arena: KVArena
    """The memory of the layers' keys and values."""
    first_layer: int
    """The arena's layer for layer 0 of the stack."""
    rows: Int[Tensor, " w"]
    """Rows for the keys and values of the first tokens, then for those of `exited`."""
    attention: CachedAttention
    """Attention of the tokens to their rows."""
    exited: Exited | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """Tokens that have exited since the last tick, if the policy stores them."""
    counts: tuple[int, ...] = ()
    """Number of tokens at each step, if there are several; tokens are ordered by step."""
    projects_alike: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]
    products: Products | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """What computes the layers' products, if they do not do it themselves."""

    @property
    def projects_keys(self) -> bool:
        return len(self.rows) > 0

    @property
    def keeps_latent_rows(self) -> bool:
        return True

    def rows_to_project(self, hidden: Tensor) -> Tensor:
        # With recursive sharing, tokens beyond step 1 only read rows that step 1 has written.
        return hidden[: len(self.rows)]

    def rows_by_step(self, count: int) -> list[tuple[int, slice]]:
        if isinstance(self.step, int):
            return [(self.step, slice(0, count))]
        ends = list(accumulate(self.counts))
        starts = [0, *ends[:-1]]
        return [
            (step, slice(start, min(end, count)))
            for step, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start < min(end, count)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        layer += self.first_layer
        if key is not None:
            self.arena.write(layer, self.rows, key[:, 0], None if value is None else value[:, 0])
        return self.attention(self.arena, layer, query[:, 0])[:, None]
