"""Attention over selected tokens.

Legend: `b` batch, `k` tokens that run the step (queries), `m` tokens whose keys they see,
`n` query heads, `g` key-value heads, `d` head size.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mor_layers.recursion.block_masks import attend_by_blocks
from mor_layers.selection import Tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def causal_mask(queries: Tokens, keys: Tokens) -> Bool[Tensor, "b 1 k m"] | None:
    """True where a query may see a key, or None if plain causal attention is equivalent.

    A query sees the keys at or before its position in its document that are not padding. Every
    query, including padding, also sees its own key, so that no row of the softmax is empty. "Equivalent"
    means that all tokens that are not padding get the same result.
    """
    if is_plain_causal(queries, keys):
        return None
    own = queries.positions.T[:, :, None] == keys.positions.T[:, None, :]
    return (visible(queries, keys) | own)[:, None]


def is_plain_causal(queries: Tokens, keys: Tokens) -> bool:
    """Whether plain causal attention is equivalent to `causal_mask`."""
    return queries is keys and queries.documents is None and queries.padding_trails


def visible(queries: Tokens, keys: Tokens) -> Bool[Tensor, "b k m"]:
    """True where a key is at or before the query's position, in its document, and not padding."""
    q = queries.positions.T[:, :, None]  # [k b] -> [b k 1]
    k = keys.positions.T[:, None, :]  # [m b] -> [b 1 m]
    mask = k <= q
    if keys.is_padding is not None:
        mask = mask & ~keys.is_padding.T[:, None, :]
    if queries.documents is not None and keys.documents is not None:
        mask = mask & (queries.documents.T[:, :, None] == keys.documents.T[:, None, :])
    return mask


def attend(
    query: Float[Tensor, "k b n d"],
    key: Float[Tensor, "m b g d"],
    value: Float[Tensor, "m b g d"],
    mask: "Bool[Tensor, 'b 1 k m'] | BlockMask | None",
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "k b n d"]:
    """Grouped-query attention over selected tokens, computed by `scaled_dot_product_attention`, or by
    FlexAttention if the mask is made for it.

    Args:
        mask: True where a query may see a key; None for plain causal attention, which needs
            queries and keys of the same tokens. A block mask must have come from a context that
            was told the dropout.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        assert dropout == 0.0
        return attend_by_blocks(query, key, value, mask, scale)
    assert mask is not None or query.shape[0] == key.shape[0]
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),  # [k b n d] -> [b n k d]
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3)
