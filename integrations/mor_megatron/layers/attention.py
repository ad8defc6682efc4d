"""Attention inside Megatron layers over the selected tokens, for every KV policy.

`SDPACoreAttention` can be used in any layer spec; `RecursiveSelfAttention` replaces `SelfAttention`
inside a recursion. Both are built on `torch.nn.functional.scaled_dot_product_attention`, which runs
on a CPU and selects a fused kernel on a GPU, whereas Megatron's local core attention materialises
the full score matrix.

Legend: `b` batch, `k` tokens that run a step, `m` tokens they attend to, `n` query heads and `g`
key-value heads of this rank, `d` head size, `h` hidden, `p` is `k` padded so that the
tensor-parallel ranks can share it evenly.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
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
from torch import Tensor, nn

from mor_layers import StepContext
from mor_layers.recursion import Exited, attend
from mor_megatron.layers.quantization import filled, row_alignment
from mor_megatron.layers.relaxation import StepDeltas
from mor_megatron.step import (
    StepRotation,
    attend_packed,
    in_sequence_order,
    takes_packed,
    zigzag_positions,
)


class SDPACoreAttention(MegatronModule):
    """Core attention computed by `scaled_dot_product_attention`.

    Args:
        config: only `attention_dropout`, `sequence_parallel` and `context_parallel_size` change the
            result.
        attn_mask_type: `causal`, `padding` (requires a mask) or `no_mask`.
        softmax_scale: defaults to 1 / sqrt(head size).

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
        """`[k b n d], [m b g d] -> [k b nd]`; `attention_mask` is True where attention is not
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
        """`[k b n d], [m b g d] -> [k b nd]`; `is_visible=None` means plain causal attention."""
        dropout = self.dropout if self.training else 0.0
        forked = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = attend(query, key, value, is_visible, self.softmax_scale, dropout)
        return out.flatten(2)


class RecursiveSelfAttention(SelfAttention):
    """`SelfAttention` over the tokens of one recursion step.

    Parameters and checkpoint keys are those of `SelfAttention`. The `StepContext` arrives in the
    argument for the attention mask and the `StepRotation` in the argument for the rotary table,
    because Megatron's layers pass both through untouched (see `StepStack.forward`).
    """

    index_in_block: int
    """0-based index of the layer in the recursion block."""
    masked_attention: SDPACoreAttention | None
    """Replaces Transformer Engine's core attention for steps with a mask. With an arbitrary mask,
    Transformer Engine only has the implementation that materialises the full score matrix; PyTorch
    has a memory-efficient kernel."""
    deltas: StepDeltas | None
    """What each step adds to the projections (see `relaxation`); None without relaxation."""

    def join_block(self, index: int, input_norm: nn.Module) -> None:
        """Store the index in the block and the norm that the layer applies before attention."""
        self.index_in_block, self.deltas = index, None
        self.__dict__["input_norm"] = input_norm  # registered by the layer, not here
        self.masked_attention = None
        if takes_packed(self.core_attention) and not self._options_of_the_core:
            self.masked_attention = SDPACoreAttention(
                self.config,
                self.layer_number,
                AttnMaskType.causal,
                "self",
                softmax_scale=self.core_attention.softmax_scale,
            )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: StepContext,
        rotary_pos_emb: StepRotation | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[p/tp b h] -> [p/tp b h]` under sequence parallelism, else `[k b h] -> [k b h]`.

        Args:
            packed_seq_params: the step's documents, where packing them is exact (`packing`).
        """
        context, count = attention_mask, len(attention_mask.tokens.positions)
        query, key, value = self._project(hidden_states, context)
        extra = len(query) - count  # padding rows
        query = self._turn(query[:count], rotary_pos_emb)
        if key is not None and value is not None:
            key, value = key[:count], value[:count]
            if context.exited is not None:
                exited = self._project_exited(context.exited)
                key, value = torch.cat([key, exited[0]]), torch.cat([value, exited[1]])
            key = self._turn(key, rotary_pos_emb)
        key, value = context.exchange(self.index_in_block, key, value)
        out = self._attend(query, key, value, context, packed_seq_params)
        out = F.pad(out, (0, 0, 0, 0, 0, extra)) if extra else out
        return self.linear_proj(out)

    def _project(
        self, hidden: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if context.projects_keys:
            return self.get_query_key_value_tensors(hidden)  # type: ignore[return-value]
        if not self._can_project_parts:
            return self.get_query_key_value_tensors(hidden)[0], None, None
        query = self._project_part(hidden, slice(None, -2))
        if self.deltas is not None:
            weight, flat = self.parts_of(self.linear_qkv.weight)[0], query.flatten(2)
            query = self.deltas.relax("query", hidden, flat, weight).view_as(query)
        return query if self.q_layernorm is None else self.q_layernorm(query), None, None

    def _project_exited(self, exited: Exited) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens that have just exited, `[x b g d]`."""
        rows = filled(exited.hidden, row_alignment(self.config))
        count, hidden = len(exited.tokens.positions), self.input_norm(rows)
        if not self._can_project_parts:
            _, key, value = self.get_query_key_value_tensors(hidden)[:3]  # type: ignore[misc]
            return key[:count], value[:count]  # type: ignore[return-value]
        # [x b 2gd] -> [x b g 2 d]
        both = self._project_part(hidden, slice(-2, None))[:count].unflatten(2, (-1, 2))
        key, value = both.unbind(dim=3)
        return key if self.k_layernorm is None else self.k_layernorm(key), value

    def parts_of(self, fused: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Split a fused QKV tensor into queries, keys and values.

        Dimension `dim` becomes three: `[g (q.. k v) d] -> [g q|1|1 d]`.
        """
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = fused.unflatten(dim, (groups, -1, size))
        place = dim + 1 if dim >= 0 else dim - 1  # index of the heads dimension
        return heads.split([heads.shape[place] - 2, 1, 1], dim=place)

    def relax_qkv(self, linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """Forward hook on `linear_qkv` that adds the current step's deltas to its output."""
        assert self.deltas is not None
        parts = []
        for name, part, weight in zip(
            ("query", "key", "value"),
            self.parts_of(output[0], dim=-1),  # [p b g (q.. k v) d] -> [p b g q|1|1 d]
            self.parts_of(linear.weight),
            strict=True,
        ):
            relaxed = self.deltas.relax(name, inputs[0], part.flatten(-3), weight)
            parts.append(relaxed.view_as(part))
        return (torch.cat(parts, dim=-2).flatten(-3), *output[1:])

    def relax_output(self, linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """Forward hook on `linear_proj` that adds the current step's delta to its output."""
        assert self.deltas is not None
        return self.deltas.relax("output", inputs[0], output[0], linear.weight), *output[1:]

    @property
    def _options_of_the_core(self) -> bool:
        """Whether the configuration asks for something that SDPA does not compute."""
        config = self.config
        return (
            config.softmax_type != "vanilla"
            or config.window_size is not None
            or config.apply_query_key_layer_scaling
            or config.qk_clip
            or config.log_max_attention_logit
        )

    @property
    def _can_project_parts(self) -> bool:
        # Not possible in three cases: fused gradient accumulation writes into the buffer of the
        # whole weight; a rank with less than one query group holds no complete group; and
        # subclasses (Transformer Engine's) always compute with the whole weight.
        return (
            type(self.linear_qkv) is ColumnParallelLinear
            and not self.config.gradient_accumulation_fusion
            and self.config.num_query_groups >= self.world_size
        )

    def _project_part(self, hidden: Tensor, part: slice) -> Tensor:
        """`[p/tp b h] -> [p b n d]`, using only the heads `part` of each group's `(q.. k v)`."""
        linear = self.linear_qkv
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head

        def taken(fused: Tensor) -> Tensor:  # [groups (q.. k v) d, ...] -> [groups part d, ...]
            return fused.unflatten(0, (groups, -1, size))[:, part].flatten(0, 2)

        out = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=taken(linear.weight),
            bias=None if linear.bias is None else taken(linear.bias),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=linear.allreduce_dgrad,
            sequence_parallel=linear.sequence_parallel,
            tp_group=linear.tp_group,
        )
        return out.unflatten(-1, (-1, size))

    @staticmethod
    def _turn(heads: Tensor, rotation: StepRotation | None) -> Tensor:
        return heads if rotation is None else rotation.turn(heads)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: StepContext,
        sequences: PackedSeqParams | None,
    ) -> Tensor:
        core: Any = self.core_attention
        if sequences is not None and not takes_packed(core):
            sequences = None
        mask = context.causal_mask if sequences is None else None
        if mask is not None and self.masked_attention is not None:
            core = self.masked_attention

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if isinstance(core, SDPACoreAttention):
                return core.attend(query, key, value, mask)
            if sequences is not None:
                return attend_packed(core, query, key, value, sequences)
            # Megatron and Transformer Engine mask out the positions where their mask is True.
            kind = AttnMaskType.causal if mask is None else AttnMaskType.arbitrary
            barred = None if mask is None else ~mask
            return core(query, key, value, barred, attn_mask_type=kind, attention_bias=None,
                        packed_seq_params=None)  # fmt: skip

        if self.checkpoint_core_attention and self.training:
            return checkpoint(run, False, query, key, value)
        return run(query, key, value)
