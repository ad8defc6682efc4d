"""Attention of Megatron layers over selected tokens, for every KV policy.

`SDPACoreAttention` goes into any layer spec, `RecursiveSelfAttention` replaces `SelfAttention`
inside a recursion. Both rest on `torch.nn.functional.scaled_dot_product_attention`, which runs on
a CPU and picks a fused kernel on a GPU; Megatron's local core materialises all scores.

Legend: `b` batch, `k` tokens that run a step, `m` tokens whose keys they see, `n` query heads and
`g` key-value heads of this rank, `d` head size, `h` hidden, `p` `k` filled up for the ranks.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mor_layers.attention import StepContext, attend


class SDPACoreAttention(MegatronModule):
    """A `core_attention` on `scaled_dot_product_attention`.

    Args:
        config: `attention_dropout` and `sequence_parallel` are read.
        attn_mask_type: `causal` or `padding` (with a mask given) or `no_mask`.
        softmax_scale: default 1 / sqrt(head size).

    Raises:
        ValueError: for an option it does not implement.
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
    ) -> None:
        super().__init__(config=config)
        refused = {
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "context_parallel_size": config.context_parallel_size > 1,
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
        """`[k b n d], [m b g d] -> [k b nd]`; `attention_mask` is True where barred."""
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "SDPACoreAttention takes neither attention_bias nor packed_seq_params. Use "
                "Transformer Engine's core attention for them."
            )
        is_causal = (
            self.is_causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        )
        is_visible = None if attention_mask is None else ~attention_mask
        if is_visible is None and not is_causal:
            is_visible = query.new_ones((1, 1, len(query), len(key)), dtype=torch.bool)
        elif is_visible is not None and is_causal:
            is_visible = is_visible & torch.ones_like(is_visible).tril(len(key) - len(query))
        return self.attend(query, key, value, is_visible)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None
    ) -> Tensor:
        """`[k b n d], [m b g d] -> [k b nd]`; None for plain causal attention."""
        dropout = self.dropout if self.training else 0.0
        forked = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = attend(query, key, value, is_visible, self.softmax_scale, dropout)
        return out.flatten(2)


@dataclass(frozen=True)
class StepRotation:
    """Rotary embedding at the positions of a step's tokens: cosines and sines `[k b|1 1 r]`."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def table(cls, frequencies: Tensor, scale: float, dtype: torch.dtype) -> "StepRotation":
        """Of all positions, from Megatron's `rotary_pos_emb` `[s 1 1 r]`."""
        cos, sin = frequencies.float().cos() * scale, frequencies.float().sin() * scale
        return cls(cos.to(dtype), sin.to(dtype))

    def at(self, positions: Tensor) -> "StepRotation":
        """Of the given positions `[k b]`."""
        return StepRotation(self.cos[:, 0][positions], self.sin[:, 0][positions])

    def turn(self, heads: Tensor) -> Tensor:
        """`[k b n d] -> [k b n d]`; a head's numbers beyond `r` stay."""
        size = self.cos.shape[-1]
        turned, rest = heads[..., :size], heads[..., size:]
        turned = turned * self.cos + _rotate_half(turned, False) * self.sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class RecursiveSelfAttention(SelfAttention):
    """`SelfAttention` on the tokens of a recursion step.

    The step's context arrives where a layer hands on its attention mask, and a `StepRotation`
    where it hands on the rotary table. Same parameters as `SelfAttention`, same checkpoint keys.
    """

    index_in_block: int
    """0-based place in the recursion block; set by the stack that owns the layer."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: StepContext,
        rotary_pos_emb: StepRotation | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[p/tp b h] -> [p/tp b h]` under sequence parallelism, else `[k b h] -> [k b h]`."""
        context, count = attention_mask, len(attention_mask.tokens.positions)
        query, key, value = self._project(hidden_states, context)
        extra = len(query) - count  # rows that only fill up the ranks
        query = self._turn(query[:count], rotary_pos_emb)
        if key is not None and value is not None:
            key, value = self._turn(key[:count], rotary_pos_emb), value[:count]
        key, value = context.exchange(self.index_in_block, key, value)
        out = self._attend(query, key, value, context)
        out = F.pad(out, (0, 0, 0, 0, 0, extra)) if extra else out
        return self.linear_proj(out)

    def _project(
        self, hidden: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if context.projects_keys:
            return self.get_query_key_value_tensors(hidden)  # type: ignore[return-value]
        if not self._can_project_queries_alone:
            return self.get_query_key_value_tensors(hidden)[0], None, None
        return self._project_queries(hidden), None, None

    @property
    def _can_project_queries_alone(self) -> bool:
        # Fused gradient accumulation writes into the whole weight's buffer; a rank with less than
        # a group of queries has no weight of its own; other classes compute with the whole weight.
        return (
            type(self.linear_qkv) is ColumnParallelLinear
            and not self.config.gradient_accumulation_fusion
            and self.config.num_query_groups >= self.world_size
        )

    def _project_queries(self, hidden: Tensor) -> Tensor:
        linear = self.linear_qkv
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head

        def queries(fused: Tensor) -> Tensor:  # [groups (q.. k v) d, ...] -> [groups q.. d, ...]
            return fused.unflatten(0, (groups, -1, size))[:, :-2].flatten(0, 2)

        out = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=queries(linear.weight),
            bias=None if linear.bias is None else queries(linear.bias),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=linear.allreduce_dgrad,
            sequence_parallel=linear.sequence_parallel,
            tp_group=linear.tp_group,
        )
        query = out.unflatten(-1, (-1, size))
        return query if self.q_layernorm is None else self.q_layernorm(query)

    @staticmethod
    def _turn(heads: Tensor, rotation: StepRotation | None) -> Tensor:
        return heads if rotation is None else rotation.turn(heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: StepContext) -> Tensor:
        core, mask = self.core_attention, context.causal_mask

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if isinstance(core, SDPACoreAttention):
                return core.attend(query, key, value, mask)
            # Megatron and Transformer Engine bar attention where their mask is True.
            kind = AttnMaskType.causal if mask is None else AttnMaskType.arbitrary
            barred = None if mask is None else ~mask
            return core(query, key, value, barred, attn_mask_type=kind, attention_bias=None,
                        packed_seq_params=None)  # fmt: skip

        if self.checkpoint_core_attention and self.training:
            return checkpoint(run, False, query, key, value)
        return run(query, key, value)
