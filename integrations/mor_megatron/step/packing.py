"""Selected tokens of several documents as Transformer Engine's packed (`thd`) sequences.

With causal attention within documents, each document can be treated as a sequence. Transformer Engine
has fused kernels for packed sequences (`padding_causal` with `cu_seqlens`), whereas for an explicit
mask (`arbitrary`) it only has the implementation that materializes all scores. Padding comes last and
becomes one more sequence.

Packing is not used if the keys are not those of the queries' own tokens (shared or updated keys, or
keys of exited tokens), because a query then has another index among the keys than among the queries.
It is not used for whole sequences of different lengths either: right padding needs no mask, so they
stay in the `sbhd` format with plain causal attention.

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
    """Whether a core attention is Transformer Engine's, which supports packed sequences."""
    return hasattr(core, "qkv_format")


def packed(context: StepContext, num_documents: int | None) -> PackedSeqParams | None:
    """The boundaries of the documents in the rows of a step, or None if packing is not exact.

    The number of sequences does not depend on the selection, so no synchronization with the device
    is needed. Documents without selected tokens are sequences of length 0.

    Args:
        num_documents: largest number of documents in a sequence of the batch. None: one.
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
    """Attention of packed sequences: `[k b n d], [k b g d] -> [k b nd]`."""
    count, batch = query.shape[:2]
    rows = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [k b ..] -> [bk ..]
    out = core(
        *rows,
        None,
        attn_mask_type=AttnMaskType.causal,  # the core changes this to padding_causal
        attention_bias=None,
        packed_seq_params=sequences,
    )
    return out.reshape(batch, count, -1).transpose(0, 1)
