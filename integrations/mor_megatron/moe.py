"""Megatron's mixture of experts inside a recursion: one layer's weights, several steps' accounts.

A layer that runs `N_r` times has `N_r` (step, expert) rows of load and as many auxiliary losses.
Each loss enters the graph divided by `N_r` (through the coefficients of the layer's own
configuration, see `stack.inner_config`), so that a repeated layer weighs as much as any other, and
is logged as it is under the number of the unrolled layer that ran.

Legend: `s` sequence, `b` batch, `e` experts.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class StepTopKRouter(TopKRouter):
    """`TopKRouter` that keeps each step's load apart and counts no padding in its z-loss."""

    load: Tensor
    step: int = 0
    """Recursion step that runs; set by `RecursiveMoELayer`."""

    def count_load_of(self, num_recursions: int) -> None:
        """Start counting tokens per (step, expert)."""
        shape = (num_recursions, self.config.num_moe_experts)
        load = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("load", load, persistent=False)

    def routing(  # type: ignore[override]
        self, logits: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().routing(logits, padding_mask)
        # Recomputation runs the forward pass twice, the first time without gradients.
        if torch.is_grad_enabled() or not self.training:
            counted = routing_map.detach()
            if padding_mask is not None:
                counted = counted & ~padding_mask.reshape(-1, 1)
            self.load[self.step] += counted.sum(dim=0)
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """As Megatron's, with the mean taken over all ranks' valid tokens.

        Megatron averages the ranks' own means, which is off where their numbers of valid tokens
        differ, as they do when a selection does not divide by the number of ranks.
        """
        coefficient = self.config.moe_z_loss_coeff
        if padding_mask is None or not coefficient:
            return super().apply_z_loss(logits, padding_mask)
        if not (self.training and torch.is_grad_enabled()):
            return logits
        is_valid = ~padding_mask
        count = is_valid.sum()
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


class RecursiveMoELayer(MoELayer):
    """`MoELayer` that knows which step it runs, in a recomputed forward pass too."""

    router: StepTopKRouter

    def __init__(self, *args: Any, num_recursions: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recomputes = self.moe_layer_recompute
        self.moe_layer_recompute = False  # done here, where the step is known
        self._step, self._layer_number = 0, 0
        self.router.count_load_of(num_recursions)

    def begin_step(self, step: int, layer_number: int) -> None:
        """The next forward pass runs `step` as unrolled layer `layer_number` (1-based)."""
        self._step, self._layer_number = step, layer_number

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        run = partial(self._run, self._step, self._layer_number)
        if self._recomputes and self.training:
            return checkpoint(run, False, hidden_states, intermediate_tensors, padding_mask)
        return run(hidden_states, intermediate_tensors, padding_mask)

    def _run(
        self,
        step: int,
        layer_number: int,
        hidden_states: Tensor,
        intermediate_tensors: Any,
        padding_mask: Tensor | None,
    ) -> Any:
        self.set_layer_number(layer_number)
        self.router.step = step
        count, extra = len(hidden_states), self._rows_missing(hidden_states)
        if extra:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, 0, extra))
            if padding_mask is None:
                padding_mask = hidden_states.new_zeros(hidden_states.shape[1], count).bool()
            padding_mask = F.pad(padding_mask, (0, extra), value=True)
        output, bias = super().forward(hidden_states, intermediate_tensors, padding_mask)
        return output[:count], bias

    def _rows_missing(self, hidden: Tensor) -> int:
        """Rows to add so that all ranks of an all-gather dispatch have equally many.

        Replicas may select different numbers of tokens; the all-to-all dispatcher does not mind.
        """
        group = self.token_dispatcher.tp_ep_group
        if self.config.moe_token_dispatcher_type != "allgather" or group.size() == 1:
            return 0
        most = torch.tensor(len(hidden), device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        return int(most) - len(hidden)
