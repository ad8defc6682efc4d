"""Masks of selected tokens for FlexAttention, which computes no block of scores that is masked out.

The masked form of attention needs a mask of all queries and keys, and computes all scores. A block mask
says for blocks of queries and keys whether all, some, or no pairs are visible. Here that is found from
the smallest and largest position of each block, so the full mask is never made: `128²` times less
memory, and nothing waits for the device.

FlexAttention is compiled for a GPU when it is first called. Its kernels have no dropout.

Legend: `b` batch, `k` queries, `m` keys, `n` query heads, `g` key-value heads, `d` head size,
`x` blocks of queries, `y` blocks of keys.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.selection import Tokens
from mor_layers.selection.fused import are_fused_kernels_allowed
from mor_layers.selection.fused.trial import passes

if TYPE_CHECKING:  # importing it takes seconds, so that only those who use it do
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128
"""Rows and columns of a block, for which FlexAttention's kernels are tuned."""
_SMALLEST_HEAD = 16
"""FlexAttention's kernels take no smaller heads."""
_AFTER_ALL = 2**31 - 1


def attends_by_blocks(
    query: Float[Tensor, "k b n d"],
    key: Float[Tensor, "m b g d"],
    value: Float[Tensor, "m b g v"],
    dropout: float = 0.0,
) -> bool:
    """Whether FlexAttention is used for attention with a mask: on GPUs, without dropout, if there is a
    block to leave out."""
    return (
        dropout == 0.0
        and are_fused_kernels_allowed()
        and runs_flex_attention(query.device)
        and min(query.shape[-1], value.shape[-1]) >= _SMALLEST_HEAD
        and len(key) > _BLOCK
    )


def runs_flex_attention(device: torch.device) -> bool:
    """Whether FlexAttention has forward and backward kernels for a device, which is tried once. Tests
    replace this function."""
    if device.type != "cuda":
        return False
    # A graph that is being compiled compiles FlexAttention with the rest.
    return torch.compiler.is_compiling() or flex_attention_passes(device)


@cache
def flex_attention_passes(device: torch.device) -> bool:
    """Whether FlexAttention computes on a device what attention with a mask does, on a few tokens."""
    from mor_layers.recursion.attention import attend, causal_mask

    length, heads, size = 2 * _BLOCK, 2, _SMALLEST_HEAD
    keys = Tokens.whole_sequence(length, 1, device)
    queries = keys.take(torch.arange(0, length, 2, device=device)[:, None], None)
    numbers = torch.linspace(-1, 1, length * heads * size, device=device)

    def run(mask: Any) -> Iterator[Tensor]:
        with torch.enable_grad():
            key = numbers.view(length, 1, heads, size).clone().requires_grad_()
            query = key.detach().flip(0)[::2].requires_grad_()
            out = attend(query, key, key, mask)
            yield from (out, *torch.autograd.grad(out.square().sum(), (query, key)))

    return passes(
        "FlexAttention",
        lambda: run(block_mask(queries, keys)),
        lambda: run(causal_mask(queries, keys)),
    )


def block_mask(
    queries: Tokens,
    keys: Tokens,
    window: int | None = None,
    own_row: bool = False,
    size: int | None = None,
) -> "BlockMask":
    """The mask of `causal_mask` as blocks.

    Args:
        window: how many positions before its own a query sees; None: all of them.
        own_row: a query without visible keys sees the key in its own row (`exit_state`), and not that of
            its own position.
        size: of a block; None: 128.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = size or _BLOCK
    # What fills the last block is never visible: queries before all keys, and keys after all queries.
    first_query, last_query = _bounds(queries.positions, size, -1)
    first_key, last_key = (bound[:, None] for bound in _bounds(keys.positions, size, _AFTER_ALL))
    first_query, last_query = first_query[..., None], last_query[..., None]
    some = first_key <= last_query  # [b x y]
    every = last_key <= first_query
    if window is not None:
        some = some & (last_key >= first_query - window)
        every = every & (first_key >= last_query - window)
    if queries.documents is not None and keys.documents is not None:
        first, last = (bound[..., None] for bound in _bounds(queries.documents, size, -1))
        begins, ends = (bound[:, None] for bound in _bounds(keys.documents, size, _AFTER_ALL))
        some = some & (begins <= last) & (ends >= first)
        every = every & (begins == ends) & (first == last) & (begins == first)
    if keys.is_padding is not None:
        has_padding = _bounds(keys.is_padding.long(), size, 1)[1][:, None] > 0
        every = every & ~has_padding
    if own_row:
        some = some | torch.eye(*some.shape[1:], dtype=torch.bool, device=some.device)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every & some),
        BLOCK_SIZE=size,
        mask_mod=_rule(queries, keys, window, own_row),
        seq_lengths=(len(queries.positions), len(keys.positions)),
    )


def _bounds(values: Int[Tensor, "k b"], size: int, fill: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each block, `[b x]`; `fill` stands in missing rows."""
    blocks = F.pad(values.T, (0, -len(values) % size), value=fill).unflatten(-1, (-1, size))
    return blocks.amin(dim=-1), blocks.amax(dim=-1)


def _listed(chosen: Bool[Tensor, "b x y"]) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and which ones, for all heads."""
    chosen = chosen[:, None]
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def _rule(
    queries: Tokens, keys: Tokens, window: int | None, own_row: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask of single tokens, for blocks of which only some are visible."""
    query_positions, key_positions = queries.positions.T, keys.positions.T  # [b k], [b m]
    is_padding = None if keys.is_padding is None else keys.is_padding.T
    query_documents = key_documents = None
    if queries.documents is not None and keys.documents is not None:
        query_documents, key_documents = queries.documents.T, keys.documents.T

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, of = query_positions[batch, query], key_positions[batch, key]
        is_seen = of <= at
        if is_padding is not None:
            is_seen = is_seen & ~is_padding[batch, key]
        if query_documents is not None and key_documents is not None:
            is_seen = is_seen & (query_documents[batch, query] == key_documents[batch, key])
        is_seen = is_seen | (query == key if own_row else at == of)
        return is_seen if window is None else is_seen & (at - of <= window)

    return sees


def attend_by_blocks(
    query: Float[Tensor, "k b n d"],
    key: Float[Tensor, "m b g d"],
    value: Float[Tensor, "m b g v"],
    mask: "BlockMask",
    scale: float | None = None,
) -> Float[Tensor, "k b n v"]:
    """Grouped-query attention over selected tokens, computed by FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a graph of torch.compile it is compiled with the rest.
    is_compiled = torch.compiler.is_compiling() or query.device.type == "cpu"
    run: Any = flex_attention if is_compiled else _compiled()
    out = run(
        query.permute(1, 2, 0, 3),  # [k b n d] -> [b n k d]
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
