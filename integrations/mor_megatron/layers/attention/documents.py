"""Transformer Engine's core attention for layers outside a recursion, with several documents per
sequence.

Legend: `s` sequence, `b` batch, `n` heads, `d` head size.
"""

from functools import cache
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mor_layers import StepContext, Tokens
from mor_megatron.step import attend_packed, documents_of, packed


@cache
def document_attention() -> type:
    """Return a `TEDotProductAttention` subclass that respects document boundaries.

    Under causal attention Transformer Engine ignores the mask, so that Megatron's ordinary layers
    would silently attend across documents. This class converts such a mask into packed sequences,
    as a recursion does (see `packing`). A mask that is merely causal is recognised and dropped.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class DocumentAttention(TEDotProductAttention):
        """See `document_attention`."""

        def forward(  # type: ignore[override]
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            attention_bias: Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
            **options: Any,
        ) -> Tensor:
            """`[s b n d] -> [s b nd]`.

            Raises:
                ValueError: the mask is not causal attention within documents, or a mask is given
                    under context parallelism.
            """
            given = (attention_bias, packed_seq_params)
            is_lost = attention_mask is not None and attn_mask_type == AttnMaskType.causal
            if is_lost and given == (None, None) and len(query) == len(key):
                if self.config.context_parallel_size > 1:
                    raise ValueError(
                        "Transformer Engine ignores attention_mask under context parallelism. "
                        "Pass None if each sequence is one document (create_attention_mask=False "
                        "in GPTDatasetConfig), else use transformer_impl='local'."
                    )
                length, batch = query.shape[:2]
                documents, count = documents_of(attention_mask)
                attention_mask = None
                if documents is not None:
                    documents = documents.expand(-1, batch)
                    tokens = Tokens.whole_sequence(length, batch, query.device, documents)
                    sequences = packed(StepContext(0, tokens), count)
                    assert sequences is not None
                    return attend_packed(super().forward, query, key, value, sequences)
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, *given, **options
            )

    return DocumentAttention
