"""Multi-latent attention inside Megatron layers over the selected tokens, for every KV policy.

A token's keys and values are projections of a latent row, of `kv_lora_rank` numbers for all heads,
and of a rotary part that the heads share. These rows are what a KV policy keeps, shares and updates,
and what context parallelism gathers: they are much smaller than keys and values. Every step then
projects the rows that it sees, which costs little beside a layer. With
`recompute_modules=["mla_up_proj"]`, keys and values are freed after attention.

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1), in Megatron's form.

Legend: `b` batch, `k` tokens that run a step, `m` tokens they attend to, `n` heads of this rank, `h`
hidden, `c` latent row, `q` latent row of queries (or `h` without one), `r` rotary part of a head, `d`
head size of queries and keys, `v` head size of values, `p` is `k` padded so that the tensor-parallel
ranks can share it evenly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from mor_layers import StepContext
from mor_megatron.layers.attention.step import StepAttention
from mor_megatron.layers.quantization import filled, row_alignment
from mor_megatron.step import StepRotation, padded


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` with the gradients of one rank on any number of tensor-parallel ranks.

    Two of Megatron's gradients are those of one rank only under some layouts (0.19.2):

    * The heads share the rotary part of the keys, so its gradient is a sum over all heads. Megatron
      sums over a rank's own heads, except with Transformer Engine's linear layers under sequence
      parallelism. The projection, and everything before it, then gets wrong gradients.
    * Without sequence parallelism, every rank has the whole gradient of the norm of the queries'
      latent rows. By its name, `finalize_model_grads` takes it for a norm of a rank's own heads, and
      sums it over the ranks.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True  # of equal ones

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Without a latent row of queries, latent rows of keys and values alone have a norm, as in
        DeepSeek-V2-Lite. Megatron wants one in the projection of queries too.
        """
        has_own_norm = submodules.kv_layernorm not in (None, IdentityOp)
        if self.config.q_lora_rank is not None or not self.config.qk_layernorm or not has_own_norm:
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        queries, combined = super()._qkv_down_projection(hidden_states)
        group, sizes = (
            self.pg_collection.tp,
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim],
        )
        if combined.shape[-1] != sum(sizes):
            combined = gather_from_tensor_model_parallel_region(combined, group)
            if self.config.sequence_parallel:
                # As rows of this rank: Megatron gathers their rotary parts, and sums gradients.
                combined = scatter_to_sequence_parallel_region(combined, group)
        if not self.config.sequence_parallel:
            latent, position = combined.split(sizes, dim=-1)
            position = copy_to_tensor_model_parallel_region(position, group)
            combined = torch.cat([latent, position], dim=-1)
        return queries, combined


class RecursiveLatentAttention(StepAttention, LatentAttention):
    """`LatentAttention` over the tokens of one recursion step.

    Parameters and checkpoint keys are those of `MLASelfAttention`.
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
            packed_seq_params: not used. Documents are separated by a mask, because packed kernels need
                queries, keys and values of one size.
        """
        context, rotation = attention_mask, rotary_pos_emb
        assert rotation is not None, "RecursionLayer makes the rotary table of latent attention"
        count = len(context.tokens.positions)
        latent, position = self._rows_to_keep(hidden_states, context, rotation)
        latent, position = context.exchange(self.index_in_block, latent, position)

        def raise_rows(queries: Tensor, latent: Tensor, position: Tensor) -> tuple[Tensor, ...]:
            query = self._query(queries)
            own = rotation.turn(query[:count, ..., -self.config.qk_pos_emb_head_dim :])
            query = torch.cat([query[:count, ..., : self.config.qk_head_dim], own], dim=-1)
            return query, *self._keys_and_values(latent, position)

        queries = self._query_rows(hidden_states)
        saver = None
        if self.recompute_up_proj and self.training:
            saver = CheckpointWithoutOutput(fp8=self.config.fp8 or self.config.fp4)
            query, key, value = saver.checkpoint(raise_rows, queries, latent, position)
        else:
            query, key, value = raise_rows(queries, latent, position)
        out = self._attend(query, key, value, context, None)
        if saver is not None:
            saver.discard_output_and_register_recompute(out)
        extra = self._num_rows(hidden_states) - count  # padding rows
        out = F.pad(out, (0, 0, 0, 0, 0, extra)) if extra else out
        return self.linear_proj(out)

    def rotation(self, length: int, dtype: torch.dtype) -> StepRotation:
        """The rotary table of a whole sequence, from this layer's own rotary embedding."""
        # "Packed" means: for the whole sequence, even where context-parallel ranks share it.
        made, scale = self.rotary_pos_emb(length, packed_seq=True), 1.0
        angles = made
        if self.config.rope_type == "yarn":
            angles, scale = made
        interleaved = self.config.rotary_interleaved
        return StepRotation.table(angles, scale, dtype, is_interleaved=interleaved, regroups=True)

    def _num_rows(self, hidden: Tensor) -> int:
        """The rows `p` of all ranks that share them."""
        return len(hidden) * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)

    def _rows_to_keep(
        self, hidden: Tensor, context: StepContext, rotation: StepRotation
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latent rows `[kx b 1 c]` and the rotary parts of keys `[kx b 1 r]`; None if they are not
        needed.

        All tensor-parallel ranks have all rows, and their gradients too.
        """
        if not context.projects_keys:
            return None, None
        parts = [self._down(hidden, len(context.tokens.positions))]
        if context.exited is not None:
            count = len(context.exited.tokens.positions)
            parts.append(self._down(self._normed_rows(context.exited), count))
        latent, position = (torch.cat(rows)[:, :, None] for rows in zip(*parts, strict=True))
        return latent, rotation.turn(position)

    def _down(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`[p/tp b h] -> [count b c], [count b r]`."""
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        combined, _ = self.linear_kv_down_proj(hidden)
        # Megatron's own linear layer splits the columns, and has gathered the rows for that. Transformer
        # Engine's is a copy on every rank, for the rank's own rows.
        has_all_rows = combined.shape[-1] != sum(sizes)
        group, is_spread = self.pg_collection.tp, self.config.sequence_parallel
        if has_all_rows:
            combined = gather_from_tensor_model_parallel_region(combined, group)
        latent, position = combined.split(sizes, dim=-1)
        if (
            has_all_rows and is_spread
        ):  # a norm's gradient is summed over ranks: each takes its rows
            latent = scatter_to_sequence_parallel_region(latent, group)
        latent = self.kv_layernorm(latent)
        if is_spread:
            latent = self._gathered(latent)
            position = position if has_all_rows else self._gathered(position)
        return latent[:count], position[:count]

    def _gathered(self, rows: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(
            rows, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )

    def _query_rows(self, hidden: Tensor) -> Tensor:
        """What the last projection of the queries takes, `[p/tp b q]`."""
        if self.config.q_lora_rank is None:
            return hidden
        rows, _ = self.linear_q_down_proj(hidden)
        group = self.pg_collection.tp
        if rows.shape[-1] != self.config.q_lora_rank:
            rows = gather_from_tensor_model_parallel_region(rows, group)
            if self.config.sequence_parallel:
                rows = scatter_to_sequence_parallel_region(rows, group)
        return self.q_layernorm(rows)

    def _query(self, rows: Tensor) -> Tensor:
        """`[p/tp b q] -> [p b n d]`, before rotation."""
        has_latents = self.config.q_lora_rank is not None
        query, _ = (self.linear_q_up_proj if has_latents else self.linear_q_proj)(rows)
        return query.unflatten(-1, (-1, self.q_head_dim))

    def _keys_and_values(self, latent: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`[m b 1 c], [m b 1 r] -> [m b n d], [m b n v]`."""
        group, sizes = self.pg_collection.tp, [self.config.qk_head_dim, self.config.v_head_dim]
        rows = latent[:, :, 0]
        if self.config.sequence_parallel:
            extra = padded(len(rows), group) - len(rows)
            rows = scatter_to_sequence_parallel_region(F.pad(rows, (0, 0, 0, 0, 0, extra)), group)
        else:
            rows = filled(rows, row_alignment(self.config))
        raised, _ = self.linear_kv_up_proj(rows)
        raised = raised[: len(latent)].unflatten(-1, (-1, sum(sizes)))  # [m b n (d-r)+v]
        key, value = raised.split(sizes, dim=-1)
        # Every head takes the rotary part, and each rank has some of the heads.
        position = copy_to_tensor_model_parallel_region(position, group)
        return torch.cat([key, position.expand(*key.shape[:-1], -1)], dim=-1), value
