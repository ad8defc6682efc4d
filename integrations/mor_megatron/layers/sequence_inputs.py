"""What a RecursionLayer is given beside hidden states: documents, padding and rotary positions.

Legend: `s` sequence, `b` batch, `h` hidden, `r` rotary size; under sequence parallelism a rank holds
`s / tp` rows, under context parallelism those of its share.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mor_layers import Tokens
from mor_megatron.layers.attention.latent import RecursiveLatentAttention
from mor_megatron.step import (
    PackedDocuments,
    Relayout,
    SequenceParallelPlacement,
    StepRotation,
    documents_of,
    in_sequence_order,
    packed_documents,
    require_no_mask,
    zigzag_positions,
)


@dataclass(frozen=True)
class SequenceInputs:
    """Reads the inputs of a layer for whole sequences, of which a rank may hold a share."""

    config: TransformerConfig
    groups: ProcessGroupCollection

    def placement(self) -> SequenceParallelPlacement | None:
        """How the rows of a step are placed: in sequence order over the ranks that share a sequence.

        None: every rank has all rows.
        """
        is_spread = self.config.sequence_parallel
        if self.config.context_parallel_size > 1:
            return SequenceParallelPlacement(self.groups.tp_cp if is_spread else self.groups.cp)
        return SequenceParallelPlacement(self.groups.tp) if is_spread else None

    def relayout(
        self, length: int, packed: PackedDocuments | None, device: torch.device
    ) -> Relayout | None:
        """The exchange between Megatron's split of a sequence and that of `placement`; None: they are
        the same.
        """
        size, placement = self.config.context_parallel_size, self.placement()
        if size == 1:
            return None
        assert placement is not None
        positions = zigzag_positions(length, size, packed=packed).cpu()
        return Relayout(positions, placement.group, device)

    def packed(
        self, hidden: Tensor, attention_mask: Tensor | None, packed_seq_params: Any
    ) -> PackedDocuments | None:
        """The documents of a packed sequence, of which a rank holds some rows.

        Raises:
            ValueError: an input does not go with packed documents.
        """
        if packed_seq_params is None:
            return None
        require_no_mask(attention_mask)
        length, batch = hidden.shape[:2]
        if self.config.sequence_parallel:
            length *= self.groups.tp.size()
        length *= self.config.context_parallel_size
        if packed_seq_params.tokens_per_sample not in (None, length):
            refuse_joined_samples(self.config)
        return packed_documents(packed_seq_params, length, batch)

    def tokens(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        packed: PackedDocuments | None,
    ) -> tuple[Tokens, int | None]:
        """All tokens of the sequences, and an upper bound on the documents of one (None: one).

        The masks have this rank's rows or those of all ranks.
        """
        length, batch = hidden.shape[:2]
        if self.config.sequence_parallel:
            if padding_mask is not None and padding_mask.shape[1] == length:
                padding_mask = gather_from_sequence_parallel_region(
                    padding_mask.T.contiguous(), group=self.groups.tp
                ).T
            length *= self.groups.tp.size()
        is_padding = None if padding_mask is None else padding_mask.T.bool()
        if self.config.context_parallel_size > 1:
            if attention_mask is not None and attention_mask.shape[2] == length:
                rows = in_sequence_order(attention_mask.movedim(2, 0), self.groups.cp)
                attention_mask = rows.movedim(0, 2)
            if is_padding is not None and len(is_padding) == length:
                is_padding = in_sequence_order(is_padding, self.groups.cp, packed)
            length *= self.config.context_parallel_size
        documents, num_documents = None, None
        if packed is not None:
            documents, num_documents = packed.documents[:, None], packed.count
            if packed.is_padding is not None:
                is_between = packed.is_padding[:, None]
                is_padding = is_between if is_padding is None else is_padding | is_between
        elif attention_mask is not None:
            documents, num_documents = documents_of(attention_mask)
            if documents is not None:
                documents = documents.expand(-1, batch)
        tokens = Tokens.whole_sequence(length, batch, hidden.device, documents, is_padding)
        return tokens, num_documents

    def rotation(
        self,
        attention: Any,
        rotary_pos_emb: Tensor | None,
        dtype: torch.dtype,
        length: int,
        packed: PackedDocuments | None,
    ) -> StepRotation | None:
        """The rotary table of a sequence of `length` tokens, from Megatron's `[s 1 1 r]`.

        Raises:
            ValueError: the table is not one for these documents.
        """
        if isinstance(attention, RecursiveLatentAttention):  # which has a table of its own
            table = attention.rotation(length if packed is None else packed.longest, dtype)
            return table if packed is None else table.restarting(packed.offsets)
        if rotary_pos_emb is None:
            return None
        is_split = self.config.context_parallel_size > 1
        if packed is not None and is_split and self.config.mrope_section:
            raise ValueError(
                "packed_seq_params with mrope_section and context parallelism: Megatron splits such a "
                "rotary table without regard to the documents. Use context_parallel_size=1."
            )
        scale = attention._yarn_concentration_factor
        if is_split and packed is None:  # Megatron passes this rank's rows only
            rotary_pos_emb = in_sequence_order(rotary_pos_emb, self.groups.cp)
        fused = self.config.apply_rope_fusion
        table = StepRotation.table(
            rotary_pos_emb, scale, dtype, fused, self.config.rotary_interleaved
        )
        # A table as long as a packed sequence has a row for each of its tokens already, in Megatron too.
        if packed is None or len(rotary_pos_emb) == length:
            return table
        if packed.longest > len(rotary_pos_emb):
            raise ValueError(
                f"packed_seq_params has max_seqlen_q={len(rotary_pos_emb)}, but a document of "
                f"{packed.longest} tokens. It must be at least the length of the longest document."
            )
        return table.restarting(packed.offsets)


def refuse_joined_samples(config: TransformerConfig) -> None:
    """Raise ValueError if a loss of experts is a mean over samples, which were joined to one row."""
    kinds = config.moe_router_load_balancing_type
    if config.num_moe_experts is not None and "seq_aux_loss" in (
        kinds if isinstance(kinds, list) else [kinds]
    ):
        raise ValueError(
            "packed_seq_params with tokens_per_sample and moe_router_load_balancing_type="
            f"{kinds!r}: a step runs different numbers of tokens of the samples, and its experts see "
            "them as one. Use a micro-batch of one sample, or 'aux_loss'."
        )


def refuse_inputs(**inputs: Any) -> None:
    """Raise ValueError for the first of these inputs that is not None."""
    for name, given in inputs.items():
        if given is not None:
            raise ValueError(
                f"RecursionLayer does not take {name} here. Describe several documents in a sequence by "
                "packed_seq_params, or by attention_mask (reset_attention_mask=True in "
                "GPTDatasetConfig)."
            )
