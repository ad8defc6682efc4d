"""Selected tokens of several documents as Transformer Engine's packed (`thd`) sequences.

Under plain causal attention within documents every document is a sequence of its own. Transformer
Engine has fused kernels for those (`padding_causal` with `cu_seqlens`), but for a mask (`arbitrary`)
only the implementation that materialises all scores. Padding, which comes last, is one more sequence.

Not for keys beyond the queries' own tokens (shared, updated, of exited tokens): a query's place among
them is not its place among queries. Nor where sequences are ragged but whole: right padding needs no
mask, so they stay `sbhd`, as plain causal attention.

Legend: `b` batch, `k` tokens that run a step, `n` heads, `d` head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mor_layers import StepContext


def takes_packed(core: Any) -> bool:
    """Whether a core attention is Transformer Engine's."""
    return hasattr(core, "qkv_format")


def packed(context: StepContext, num_documents: int | None) -> PackedSeqParams | None:
    """Where each document begins and ends among the rows of a step; None: packing is not exact.

    The number of sequences does not depend on what was selected, so that nothing waits for the
    device: documents of which no token is left are sequences of length 0.

    Args:
        num_documents: the most that a sequence of the batch has; None: one.
    """
    tokens = context.tokens
    is_exact = context.keys is tokens and tokens.padding_trails
    if num_documents is None or tokens.documents is None or not is_exact:
        return None
    count, batch = tokens.shape
    sequence = tokens.documents
    if tokens.is_padding is not None:
        sequence = sequence.masked_fill(tokens.is_padding, num_documents)
    sequence = sequence + torch.arange(batch, device=sequence.device) * (num_documents + 1)
    lengths = sequence.new_zeros(batch * (num_documents + 1))
    lengths = lengths.scatter_add(0, sequence.flatten(), torch.ones_like(sequence).flatten())
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=count,
        max_seqlen_kv=count,
    )


def attend_packed(
    core: Any, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSeqParams
) -> Tensor:
    """`[k b n d], [k b g d] -> [k b nd]`."""
    count, batch = query.shape[:2]
    rows = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [k b ..] -> [bk ..]
    out = core(
        *rows,
        None,
        attn_mask_type=AttnMaskType.causal,  # the core makes it padding_causal
        attention_bias=None,
        packed_seq_params=sequences,
    )
    return out.reshape(batch, count, -1).transpose(0, 1)
