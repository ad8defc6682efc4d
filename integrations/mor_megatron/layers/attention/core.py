"""Megatron's core attention, computed by `torch.nn.functional.scaled_dot_product_attention`.

That function runs on a CPU and selects a fused kernel on a GPU, whereas Megatron's local core attention
materialises the full score matrix.

Legend: `b` batch, `k` query rows, `m` key rows, `n` query heads and `g` key-value heads of this rank,
`d` head size of queries and keys, `v` head size of values.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from mor_layers.recursion import attend, attends_by_blocks
from mor_megatron.step import (
    PackedDocuments,
    in_sequence_order,
    packed_documents,
    require_no_mask,
    zigzag_positions,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class SDPACoreAttention(MegatronModule):
    """Core attention computed by `scaled_dot_product_attention`.

    `apply_query_key_layer_scaling` changes nothing: the factor that keeps scores small in fp16 is taken
    back before the softmax, which is computed in fp32 here.

    Args:
        config: only `attention_dropout`, `window_size`, `softmax_type`, `sequence_parallel` and
            `context_parallel_size` change the result.
        layer_number: 1-based; `window_attn_skip_freq` depends on it.
        attn_mask_type: `causal`, `padding` (requires a mask) or `no_mask`.
        softmax_scale: defaults to 1 / sqrt(head size).
        k_channels, v_channels: head sizes, which latent attention announces. Those of the tensors count.

    Raises:
        ValueError: `window_size` has room for later tokens.
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
        self.softmax_scale = softmax_scale
        self.window = window_of(config, layer_number)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        if pg_collection is not None:
            self.tp_group = pg_collection.tp
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            count = config.num_attention_heads // self.tp_group.size()
            like = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
            self.softmax_offset = nn.Parameter(torch.zeros(count, **like))
            if config.perform_initialization and config.init_method is not None:
                config.init_method(self.softmax_offset)
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

        With `packed_seq_params`, `[s n d], [s g d], [s g v] -> [s nv]`: causal attention within each
        document of a packed sequence.

        Raises:
            ValueError: an `attention_bias` is given, or a mask beside `packed_seq_params`.
        """
        if attention_bias is not None:
            raise ValueError(
                "SDPACoreAttention does not take attention_bias. Use Transformer Engine's core "
                "attention for it."
            )
        if packed_seq_params is not None:
            require_no_mask(attention_mask)
            return self._attend_within_documents(query, key, value, packed_seq_params)
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
        if self.window is not None:
            last = len(key) - len(query)  # row of the first query
            band = query.new_ones((1, 1, len(query), len(key)), dtype=torch.bool).tril(last)
            band = band.triu(last - self.window)
            is_visible = band if is_visible is None else is_visible & band
        return self.attend(query, key, value, is_visible)

    def _attend_within_documents(
        self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams
    ) -> Tensor:
        length = len(query) if self.cp_group is None else len(query) * self.cp_group.size()
        packed = packed_documents(packed_seq_params, length)
        is_visible = packed.is_visible
        query, key, value = (rows[:, None] for rows in (query, key, value))
        if self.cp_group is not None:
            return self._attend_over_ranks(query, key, value, is_visible, False, packed)[:, 0]
        if self.window is not None:
            is_visible = is_visible & torch.ones_like(is_visible).triu(-self.window)
        return self.attend(query, key, value, is_visible)[:, 0]

    def _attend_over_ranks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_visible: Tensor | None,
        is_causal: bool,
        packed: PackedDocuments | None = None,
    ) -> Tensor:
        """Attend from the rows of this context-parallel rank to the keys of all ranks.

        A mask may have this rank's query rows or those of the whole sequence.
        """
        assert self.cp_group is not None
        key, value = (in_sequence_order(rows, self.cp_group, packed) for rows in (key, value))
        dealt = zigzag_positions(len(key), self.cp_group.size(), key.device, packed)
        positions = dealt[self.cp_group.rank()]
        if is_visible is None:
            is_visible = torch.ones((1, 1, 1, len(key)), dtype=torch.bool, device=key.device)
        elif is_visible.shape[2] == len(key):
            is_visible = is_visible[:, :, positions]
        if is_causal:
            is_visible = is_visible & (
                torch.arange(len(key), device=key.device) <= positions[:, None]
            )
        if self.window is not None:
            first = positions[:, None] - self.window
            is_visible = is_visible & (torch.arange(len(key), device=key.device) >= first)
        return self.attend(query, key, value, is_visible.expand(-1, -1, len(query), -1))

    def attends_by_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `attend` takes a block mask, where a mask is needed."""
        dropout = self.dropout if self.training else 0.0
        is_plain = self.config.softmax_type == "vanilla"  # sinks are one more key for all queries
        return is_plain and attends_by_blocks(query, key, value, dropout)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_visible: "Tensor | BlockMask | None",
    ) -> Tensor:
        """`[k b n d], [m b g d], [m b g v] -> [k b nv]`; `is_visible=None` means plain causal
        attention.
        """
        dropout, scale = self.dropout if self.training else 0.0, self.softmax_scale
        if self.config.softmax_type != "vanilla":
            assert is_visible is None or isinstance(is_visible, Tensor)
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            query, key, value, is_visible = self._with_sink(query, key, value, is_visible, scale)
        forked = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = attend(query, key, value, is_visible, scale, dropout)
        return out.flatten(2)

    def _with_sink(
        self, query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One more key that every query sees: its value is zero, and its score the head's offset.

        Without an offset (`off-by-one`) the key is zero, so that its score is. Otherwise heads get
        further elements, of which the first one is the offset in queries, one in this key, and zero in
        all others. This is how a mask for all heads suffices, and fused kernels apply.
        """
        if is_visible is None:
            is_visible = query.new_ones((1, 1, len(query), len(key)), dtype=torch.bool).tril()
        is_visible = F.pad(is_visible, (0, 1), value=True)
        last = key.new_zeros((1, *key.shape[1:]))
        if self.softmax_offset is not None:
            further = 8  # kernels want sizes that are multiples of 8
            offset = (self.softmax_offset / scale)[:, None].expand(*query.shape[:-1], 1)
            query = torch.cat([query, F.pad(offset.to(query.dtype), (0, further - 1))], dim=-1)
            key = F.pad(key, (0, further))
            last = torch.cat(
                [last, F.pad(torch.ones_like(last[..., :1]), (0, further - 1))], dim=-1
            )
        key = torch.cat([key, last])
        value = torch.cat([value, value.new_zeros((1, *value.shape[1:]))])
        return query, key, value, is_visible

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The offsets of learnable sinks, which are those of a rank's heads."""
        groups = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=groups["dp_cp_group"],
        )


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens before itself a token attends to in a layer (1-based); None: all of them.

    Raises:
        ValueError: `window_size` has room for later tokens.
    """
    size = config.window_size
    if size is None or not is_layer_window_attention(
        size, config.window_attn_skip_freq, layer_number
    ):
        return None
    before, after = size
    if after > 0:
        raise ValueError(
            f"window_size={size} has room for later tokens, which causal attention cannot see. Use "
            f"({before}, 0)."
        )
    return None if before < 0 else before
