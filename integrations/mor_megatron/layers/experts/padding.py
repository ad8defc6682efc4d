"""Megatron's mixture of experts, made exact for batches with padding.

Three things that Megatron 0.19.2 does with a padding mask depend on the layout, or fail:

* its z-loss is the mean over ranks of each rank's mean over valid tokens, which differs from the mean
  over all valid tokens where ranks hold different numbers of them (sequence and context parallelism);
* the counts behind the loss-free bias combine a routing map `[t e]` with a mask `[t]`, which fails;
* on pipeline stages after the first, the mask is that of the whole sequence while the states are cut
  by sequence parallelism, which fails.

Legend: `t` tokens on this rank, `s` sequence, `b` batch, `h` hidden, `e` experts.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PaddedTopKRouter(TopKRouter):
    """`TopKRouter` whose z-loss and loss-free bias leave out padding in every layout."""

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Like Megatron's z-loss, but averaged over the valid tokens of all ranks.

        Args:
            logits: `[t e]`.
            padding_mask: `[t]`, True at padding.
        """
        coefficient = self.config.moe_z_loss_coeff
        if padding_mask is None or not coefficient:
            return super().apply_z_loss(logits, padding_mask)
        if not (self.training and torch.is_grad_enabled()):
            return logits
        count = (~padding_mask).sum()
        torch.distributed.all_reduce(count, group=self.tp_cp_group)
        squares = torch.logsumexp(logits, dim=-1).square().masked_fill(padding_mask, 0)
        z_loss = squares.sum() / count.clamp(min=1)
        get_moe_metrics_tracker().record(
            "z_loss",
            z_loss * self.tp_cp_group.size(),
            self.layer_number,
            self.config.num_layers,
            avg_group=self.tp_dp_cp_group,
        )
        return MoEAuxLossAutoScaler.apply(logits, coefficient * z_loss)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            padding_mask = padding_mask[:, None]
        super()._apply_expert_bias(routing_map, padding_mask)


class PaddedMoELayer(MoELayer):
    """`MoELayer` that takes the padding mask of the whole sequence, or of this rank's part of it."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """`[s b h]`, under sequence parallelism this rank's part of it, and a mask `[b s]`."""
        if padding_mask is not None and padding_mask.shape[1] > len(hidden_states):
            padding_mask = padding_mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        return super().forward(hidden_states, intermediate_tensors, padding_mask)


def aware_of_padding(mlp: Any) -> Any:
    """The spec of an MLP, with Megatron's own mixture of experts replaced; others stay."""
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return mlp
    parts = mlp.keywords["submodules"]
    if parts.router is not TopKRouter:
        return mlp
    keywords = mlp.keywords | {"submodules": replace(parts, router=PaddedTopKRouter)}
    return partial(PaddedMoELayer, *mlp.args, **keywords)
