"""Megatron's mixture of experts, made exact for batches with padding.

Three things that Megatron 0.19.2 does with a padding mask depend on the layout, or fail:

* its z-loss is the mean over ranks of each rank's mean over valid tokens, which differs from the mean
  over all valid tokens where ranks hold different numbers of them (sequence and context parallelism),
  and with per-token losses, so does the factor of all balance losses;
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
        if not coefficient or (padding_mask is None and not self.calculate_per_token_loss):
            return super().apply_z_loss(logits, padding_mask)
        if not (self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        count: int | Tensor = len(squares)
        if padding_mask is not None:
            squares, count = squares.masked_fill(padding_mask, 0), (~padding_mask).sum()
        total = self._over_ranks(count, logits.device)
        z_loss = squares.sum() / total.clamp(min=1)
        get_moe_metrics_tracker().record(
            "z_loss",
            z_loss * self.tp_cp_group.size(),
            self.layer_number,
            self.config.num_layers,
            avg_group=self.tp_dp_cp_group,
        )
        if self.calculate_per_token_loss:
            coefficient = coefficient * self.tokens_of_batch(total)
        return MoEAuxLossAutoScaler.apply(logits, coefficient * z_loss)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *given: Any, valid_token_count: Any = None, **named: Any
    ) -> Tensor:
        """Megatron's, which multiplies per-token losses by the valid tokens of all ranks, not of
        this one.
        """
        if self.calculate_per_token_loss:
            own = len(activation) if valid_token_count is None else valid_token_count
            total = self.tokens_of_batch(self._over_ranks(own, activation.device))
            valid_token_count = total / self.tp_cp_group.size()  # Megatron multiplies by this
        return super().attach_and_log_load_balancing_loss(
            activation, *given, valid_token_count=valid_token_count, **named
        )

    def tokens_of_batch(self, routed: Tensor) -> Tensor:
        """The tokens whose losses a micro-batch sums, given how many were routed on all ranks."""
        return routed

    def _over_ranks(self, count: int | Tensor, device: torch.device) -> Tensor:
        """The sum of the counts of all ranks that share a micro-batch."""
        total = torch.as_tensor(count, dtype=torch.float32, device=device).clone()
        torch.distributed.all_reduce(total, group=self.tp_cp_group)
        return total

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
