"""Megatron's core attention, computed by `torch.nn.functional.scaled_dot_product_attention`.

That function runs on a CPU and selects a fused kernel on a GPU, whereas Megatron's local core attention
materialises the full score matrix.

Legend: `b` batch, `k` query rows, `m` key rows, `n` query heads and `g` key-value heads of this rank,
`d` head size of queries and keys, `v` head size of values.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mor_layers.recursion import attend
from mor_megatron.step import in_sequence_order, zigzag_positions


class SDPACoreAttention(MegatronModule):
    """Core attention computed by `scaled_dot_product_attention`.

    Args:
        config: only `attention_dropout`, `sequence_parallel` and `context_parallel_size` change the
            result.
        attn_mask_type: `causal`, `padding` (requires a mask) or `no_mask`.
        softmax_scale: defaults to 1 / sqrt(head size).
        k_channels, v_channels: head sizes, which latent attention announces. Those of the tensors count.

    Raises:
        ValueError: the configuration asks for an option that is not implemented here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        refused = {
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
        }
        for option in (name for name, is_set in refused.items() if is_set):
            raise ValueError(
                f"SDPACoreAttention does not implement {option}={getattr(config, option)}. "
                "Use Megatron's own core attention, or leave the option out."
            )
        self.softmax_scale = softmax_scale
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.cp_group = None
        if config.context_parallel_size > 1:
            cp_group = None if pg_collection is None else pg_collection.cp
            self.cp_group = cp_group or parallel_state.get_context_parallel_group()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """`[k b n d], [m b g d], [m b g v] -> [k b nv]`; `attention_mask` is True where attention is not
        allowed.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "SDPACoreAttention takes neither attention_bias nor packed_seq_params. Use "
                "Transformer Engine's core attention for them."
            )
        is_causal = (
            self.is_causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        )
        is_visible = None if attention_mask is None else ~attention_mask
        if self.cp_group is not None:
            return self._attend_over_ranks(query, key, value, is_visible, is_causal)
        if is_visible is None and not is_causal:
            is_visible = query.new_ones((1, 1, len(query), len(key)), dtype=torch.bool)
        elif is_visible is not None and is_causal:
            is_visible = is_visible & torch.ones_like(is_visible).tril(len(key) - len(query))
        return self.attend(query, key, value, is_visible)

    def _attend_over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Attend from the rows of this context-parallel rank to the keys of all ranks.

        A mask may have this rank's query rows or those of the whole sequence.
        """
        assert self.cp_group is not None
        key, value = (in_sequence_order(rows, self.cp_group) for rows in (key, value))
        dealt = zigzag_positions(len(key), self.cp_group.size(), key.device)
        positions = dealt[self.cp_group.rank()]
        if is_visible is None:
            is_visible = torch.ones((1, 1, 1, len(key)), dtype=torch.bool, device=key.device)
        elif is_visible.shape[2] == len(key):
            is_visible = is_visible[:, :, positions]
        if is_causal:
            is_visible = is_visible & (
                torch.arange(len(key), device=key.device) <= positions[:, None]
            )
        return self.attend(query, key, value, is_visible.expand(-1, -1, len(query), -1))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None
    ) -> Tensor:
        """`[k b n d], [m b g d], [m b g v] -> [k b nv]`; `is_visible=None` means plain causal
        attention.
        """
        dropout = self.dropout if self.training else 0.0
        forked = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = attend(query, key, value, is_visible, self.softmax_scale, dropout)
        return out.flatten(2)
