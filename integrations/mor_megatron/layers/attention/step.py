"""What the attentions of a recursion have in common: their place in the block, and their last half.

Legend: `b` batch, `k` tokens that run a step, `m` tokens they attend to, `n` query heads and `g`
key-value heads of this rank, `d` head size.
"""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from mor_layers import StepContext
from mor_layers.recursion import Exited
from mor_megatron.layers.attention.core import SDPACoreAttention
from mor_megatron.layers.quantization import filled, row_alignment
from mor_megatron.layers.sublayers.relaxation import StepDeltas
from mor_megatron.step import StepRotation, attend_packed, takes_packed

if TYPE_CHECKING:  # what the other base class is, for the type checker alone
    from megatron.core.transformer.attention import Attention
    from torch.nn.attention.flex_attention import BlockMask
else:
    Attention = object


class StepAttention(Attention):
    """Mix-in for an attention of Megatron's over the tokens of one recursion step.

    The `StepContext` arrives in the argument for the attention mask and the `StepRotation` in the
    argument for the rotary table, because Megatron's layers pass both through untouched (see
    `StepStack.forward`).
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
        if takes_packed(self.core_attention):
            self.masked_attention = SDPACoreAttention(
                self.config,
                self.layer_number,
                AttnMaskType.causal,
                "self",
                softmax_scale=self.core_attention.softmax_scale,
            )

    def relax_output(self, linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """Forward hook on `linear_proj` that adds the current step's delta to its output."""
        assert self.deltas is not None
        return self.deltas.relax("output", inputs[0], output[0], linear.weight), *output[1:]

    def _normed_rows(self, exited: Exited) -> Tensor:
        """The states of tokens that have just exited, after the layer's norm, `[x b h]` and padding."""
        return self.input_norm(filled(exited.hidden, row_alignment(self.config)))

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
        window = core.window if isinstance(core, SDPACoreAttention) else None
        masked = self.masked_attention or core  # computes attention with a mask
        mask = None
        if sequences is None:
            by_blocks = isinstance(masked, SDPACoreAttention) and masked.attends_by_blocks(
                query, key, value
            )
            mask = visible_in(window, context, by_blocks)
        if mask is not None:
            core = masked

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if isinstance(core, SDPACoreAttention):
                return core.attend(query, key, value, mask)
            if sequences is not None:
                return attend_packed(core, query, key, value, sequences)
            # Megatron and Transformer Engine mask out the positions where their mask is True.
            kind = AttnMaskType.causal if mask is None else AttnMaskType.arbitrary
            assert mask is None or isinstance(mask, Tensor)
            barred = None if mask is None else ~mask
            return core(query, key, value, barred, attn_mask_type=kind, attention_bias=None,
                        packed_seq_params=None)  # fmt: skip

        if self.checkpoint_core_attention and self.training:
            return checkpoint(run, False, query, key, value)
        return run(query, key, value)


def visible_in(
    window: int | None, context: StepContext, by_blocks: bool = False
) -> "Tensor | BlockMask | None":
    """`[b 1 k m]`, True where a query may see a key; None for plain causal attention.

    Args:
        window: how many tokens before itself a token attends to; None: all of them. It counts positions
            in the sequence, of which a step may run some only.
        by_blocks: return a block mask for FlexAttention, if the context has one.
    """
    if by_blocks and context.masks_by_tokens:
        return context.block_mask(window)
    mask = context.causal_mask
    if window is None:
        return mask
    queries, keys = context.tokens.positions, context.key_positions
    is_near = queries.T[:, :, None] - keys.T[:, None] <= window  # [b k m]
    if mask is None:  # rows are in order, and padding comes last
        return (is_near & torch.ones_like(is_near).tril())[:, None]
    return mask & is_near[:, None]
