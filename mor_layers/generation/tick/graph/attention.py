"""Attention of the rows of a graph to the cache, in two forms that give the same.

    ReadInPlace   one operation that a compiler leaves as it is; for CPUs, where it is much the fastest
    Gathered      operations of the graph, which copy the rows that each token sees; can be recorded

Both write the rows of new keys and values first, and read and write nothing for rows without a token.

Legend: `t` rows of a graph, `w` of them that may write to the cache, `m` rows seen, `n` query heads,
`g` key-value heads, `d` head size, `p` vectors of a head in a row of the cache.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.cache import CachedAttention, KVArena, Visible, is_read_by_kernel

Attend = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]
"""From a layer, queries `[t n d]`, keys and values `[w g d]` to the output `[t n d]`."""


class ReadInPlace:
    """`CachedAttention` as an operation of a graph. It remembers the tick from `open` to the last layer.

    Args:
        arena: the memory of the layers.
        num_heads: query heads.
        first_layer: the arena's layer for layer 0.
    """

    def __init__(self, arena: KVArena, num_heads: int, first_layer: int) -> None:
        self.arena, self.num_heads, self.first_layer = arena, num_heads, first_layer
        self.are_alone = False
        """Whether the host knows that no sequence has more than one token in this tick."""
        self.number = next(_NUMBERS)
        _READERS[self.number] = self

    def open(
        self,
        visible: Visible,
        slots: Int[Tensor, " t"],
        is_token: Bool[Tensor, " t"],
        rows: Int[Tensor, " w"],
        is_written: Bool[Tensor, " w"],
        most_seen: int,
    ) -> Attend:
        """Attention of a tick. This and what it returns are called inside the graph."""
        opened = torch.ops.mor_layers.open_attention(
            *(visible.table, visible.lists, visible.counts, slots, is_token),
            *(rows, is_written, self.number),
        )

        def attend(layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
            return torch.ops.mor_layers.attend(opened, query, key, value, self.number, layer)

        return attend

    def begin(
        self, visible: Visible, slots: Tensor, is_token: Tensor, rows: Tensor, is_written: Tensor
    ) -> None:
        """Find out what the tokens see, when the graph runs."""
        self.written, self.tokens = _where(is_written), None
        self.rows = rows if self.written is None else rows[self.written]
        if is_read_by_kernel(self.arena):  # rows without a token come along, and see nothing
            visible = replace(visible, counts=visible.counts.where(is_token, 0))
        else:
            self.tokens = _where(is_token)
        if self.tokens is not None:
            lists, counts = visible.lists[self.tokens], visible.counts[self.tokens]
            visible, slots = Visible(visible.table, lists, counts), slots[self.tokens]
        self.attention = None
        if len(slots):
            self.attention = CachedAttention(
                visible, slots, self.arena, self.num_heads, self.are_alone
            )

    def attend(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Float[Tensor, "t n d"]:
        """Write and read a layer, when the graph runs."""
        layer += self.first_layer
        if key is not None:
            if self.written is not None:
                key = key[self.written]
                value = None if value is None else value[self.written]
            self.arena.write(layer, self.rows, key, value)
        if self.tokens is None and self.attention is not None:
            return self.attention(self.arena, layer, query)
        out = torch.zeros_like(query)
        if self.attention is not None:
            out[self.tokens] = self.attention(self.arena, layer, query[self.tokens])
        return out


def _where(is_wanted: Bool[Tensor, " t"]) -> Int[Tensor, " k"] | None:
    """The indices; None if all are wanted."""
    return None if bool(is_wanted.all()) else is_wanted.nonzero()[:, 0]


_NUMBERS = count()
_READERS: WeakValueDictionary[int, ReadInPlace] = WeakValueDictionary()
"""An operation gets tensors and numbers only, and finds its cache here."""

_LIBRARY = torch.library.Library("mor_layers", "FRAGMENT")
_LIBRARY.define(
    "open_attention(Tensor table, Tensor lists, Tensor counts, Tensor slots, Tensor is_token, "
    "Tensor rows, Tensor is_written, int reader) -> Tensor"
)
_LIBRARY.define(
    "attend(Tensor opened, Tensor query, Tensor? key, Tensor? value, int reader, int layer) -> Tensor"
)


def _open_attention(
    table: Tensor,
    lists: Tensor,
    counts: Tensor,
    slots: Tensor,
    is_token: Tensor,
    rows: Tensor,
    is_written: Tensor,
    reader: int,
) -> Tensor:
    visible = Visible(table, lists, counts)
    _READERS[reader].begin(visible, slots, is_token, rows, is_written)
    return torch.empty(0)


def _attend(
    opened: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    reader: int,
    layer: int,
) -> Tensor:
    return _READERS[reader].attend(layer, query, key, value)


_LIBRARY.impl("open_attention", _open_attention, "CPU")
_LIBRARY.impl("attend", _attend, "CPU")
torch.library.register_fake("mor_layers::open_attention", lambda *given: torch.empty(0))
torch.library.register_fake(
    "mor_layers::attend", lambda opened, query, *given: torch.empty_like(query)
)


class Gathered:
    """Attention as operations of the graph: each token's rows are copied.

    Args:
        arena: the memory of the layers.
        first_layer: the arena's layer for layer 0.
    """

    def __init__(self, arena: KVArena, first_layer: int) -> None:
        self.arena, self.first_layer = arena, first_layer

    def open(
        self,
        visible: Visible,
        slots: Int[Tensor, " t"],
        is_token: Bool[Tensor, " t"],
        rows: Int[Tensor, " w"],
        is_written: Bool[Tensor, " w"],
        most_seen: int,
    ) -> Attend:
        """Attention of a tick.

        Args:
            most_seen: no token sees more rows.
        """
        table = visible.table[visible.lists, :most_seen]
        counts = visible.counts.clamp(min=1)[:, None]
        is_seen = torch.arange(table.shape[1], device=table.device) < counts
        # What a list has beyond its end is undefined; its first row takes the place.
        table = torch.where(is_seen, table, table[:, :1])
        # Rows without a token write once more what the first token writes or, if there is none, what
        # the cache has there, so that no row is written with two different contents.
        index = torch.arange(len(rows), device=rows.device)
        source = torch.where(is_written, index, is_written.long().argmax())
        target, is_any = rows[source], is_written.any()

        def put(memory: Tensor, values: Tensor) -> None:
            kept = torch.where(is_any, values[source], memory.index_select(0, target))
            memory.index_copy_(0, target, kept)

        def attend(layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
            data, scales = self._layer(layer)
            if key is not None:
                new = torch.stack([key] if value is None else [key, value], dim=1)  # [w p g d]
                if scales is not None:
                    new, factors = self.arena.quantized(new)
                    put(scales, factors)
                put(data, new)
            seen = data.index_select(0, table.flatten())
            if scales is not None:
                seen = self.arena.dequantized(seen, scales.index_select(0, table.flatten()))
            seen = seen.to(query.dtype).unflatten(0, table.shape)
            vectors = seen.permute(2, 0, 3, 1, 4)  # [t m p g d] -> [p t g m d]
            keys, values = vectors[0], vectors[-1]  # the same where a row is both
            # Heads that share a key take the place of queries.
            grouped = query.unflatten(1, (keys.shape[1], -1))  # [t n d] -> [t g n/g d]
            mask = is_seen[:, None, None]
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return out.flatten(1, 2)

        return attend

    def _layer(self, layer: int) -> tuple[Tensor, Tensor | None]:
        scales = self.arena.scales
        index = self.first_layer + layer
        return self.arena.data[index], None if scales is None else scales[index]
