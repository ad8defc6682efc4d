"""Grouped-query attention inside Megatron layers over the selected tokens, for every KV policy.

Legend: `b` batch, `k` tokens that run a step, `m` tokens they attend to, `n` query heads and `g`
key-value heads of this rank, `d` head size, `h` hidden, `p` is `k` padded so that the
tensor-parallel ranks can share it evenly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from mor_layers import StepContext
from mor_layers.recursion import Exited
from mor_megatron.layers.attention.step import StepAttention
from mor_megatron.step import StepRotation


class RecursiveSelfAttention(StepAttention, SelfAttention):
    """`SelfAttention` over the tokens of one recursion step.

    Parameters and checkpoint keys are those of `SelfAttention`.
    """

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
        query, key, value, gate = self._project(hidden_states, context)
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:  # type: ignore[index]
            rotary_pos_emb = None
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
        if gate is not None:
            out = (out * gate[:count].flatten(2).float().sigmoid()).to(out.dtype)
        out = F.pad(out, (0, 0, 0, 0, 0, extra)) if extra else out
        return self.linear_proj(out)

    def _project(
        self, hidden: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Queries, keys, values, and the gate of the output (`attention_output_gate`); None for what
        is not needed.
        """
        has_gate, needs_keys = self.config.attention_output_gate, context.projects_keys
        if needs_keys or not self._can_project_parts:
            made: Any = self.get_query_key_value_tensors(hidden, output_gate=has_gate)
            key, value = made[1:3] if needs_keys else (None, None)
            return made[0], key, value, made[3] if has_gate else None
        query, gate = self._project_part(hidden, slice(None, -2)), None
        if has_gate:  # [p b g(q.. gates..) d] -> 2 of [p b n d]
            groups = self.num_query_groups_per_partition
            query, gate = (h.flatten(2, 3) for h in query.unflatten(2, (groups, 2, -1)).unbind(3))
        if self.deltas is not None:
            weight, flat = self.parts_of(self.linear_qkv.weight)[0], query.flatten(2)
            query = self.deltas.relax("query", hidden, flat, weight).view_as(query)
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        return query, None, None, gate

    def _project_exited(self, exited: Exited) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens that have just exited, `[x b g d]`."""
        count, hidden = len(exited.tokens.positions), self._normed_rows(exited)
        if not self._can_project_parts:
            has_gate = self.config.attention_output_gate
            made: Any = self.get_query_key_value_tensors(hidden, output_gate=has_gate)
            return made[1][:count], made[2][:count]
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
