"""Megatron's mixture of experts inside a recursion: one layer's weights, several steps' accounts.

A layer that runs `N_r` times has `N_r` (step, expert) rows of load and as many auxiliary losses.
Only tokens that run the step are dispatched; padding goes to no expert. Each loss enters the graph
divided by `N_r` (through the coefficients of the layer's own configuration, see
`stack.inner_config`), so that a repeated layer weighs as much as any other, and is logged as it is
under the number of the unrolled layer that ran.

Legend: `s` sequence, `b` batch, `e` experts.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mor_layers import RecursionConfig
from mor_megatron.layers.experts.router import StepTopKRouter
from mor_megatron.layers.step_aware import StepAware


class RecursiveMoELayer(StepAware, MoELayer):
    """`MoELayer` that knows which step it runs, in a recomputed forward pass too."""

    router: StepTopKRouter

    def __init__(self, *args: Any, recursion: RecursionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recomputes = self.moe_layer_recompute
        self.moe_layer_recompute = False  # done here, where the step is known
        self.router.join_recursion(recursion)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        # By the time the backward pass recomputes this, another step will have begun.
        run = partial(self._run, self.step, self.unrolled_layer_number)
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
        self.router.begin_step(step, layer_number)
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
