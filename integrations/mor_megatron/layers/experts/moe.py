"""Megatron's mixture of experts inside a recursion: shared weights, separate statistics per step.

A layer that runs `N_r` times has `N_r` rows of (step, expert) load and `N_r` auxiliary losses. Only
tokens that run the step are dispatched; padding goes to no expert. Each step's loss enters the
graph divided by `N_r`, so that a repeated layer has the same weight as any other (through the
coefficients in the layer's own configuration, see `stack.inner_config`). It is logged undivided,
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
from mor_megatron.layers.sublayers.step_aware import StepAware


class RecursiveMoELayer(StepAware, MoELayer):
    """`MoELayer` that knows which step it runs, also when its forward pass is recomputed."""

    router: StepTopKRouter

    def __init__(self, *args: Any, recursion: RecursionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recomputes = self.moe_layer_recompute
        self.moe_layer_recompute = False  # recomputed here, where the step is known
        self.router.join_recursion(recursion)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        # By the time the backward pass recomputes this, the layer is at another step and perhaps at
        # another micro-batch, so both are bound now.
        batch_size = self.router.batch_size
        run = partial(self._run, self.step, self.unrolled_layer_number, batch_size)
        if self._recomputes and self.training:
            return checkpoint(run, False, hidden_states, intermediate_tensors, padding_mask)
        return run(hidden_states, intermediate_tensors, padding_mask)

    def _run(
        self,
        step: int,
        layer_number: int,
        batch_size: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any,
        padding_mask: Tensor | None,
    ) -> Any:
        self.set_layer_number(layer_number)
        self.router.begin_step(step, layer_number)
        self.router.batch_size = batch_size
        count, extra = len(hidden_states), self._rows_missing(hidden_states)
        if extra:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, 0, extra))
            if padding_mask is None:
                padding_mask = hidden_states.new_zeros(hidden_states.shape[1], count).bool()
            padding_mask = F.pad(padding_mask, (0, extra), value=True)
        output, bias = super().forward(hidden_states, intermediate_tensors, padding_mask)
        return output[:count], bias

    def _rows_missing(self, hidden: Tensor) -> int:
        """Number of rows to add so that all ranks of an all-gather dispatch have equally many.

        Data-parallel replicas may select different numbers of tokens, which the all-to-all
        dispatcher accepts and the all-gather dispatcher does not.
        """
        group = self.token_dispatcher.tp_ep_group
        if self.config.moe_token_dispatcher_type != "allgather" or group.size() == 1:
            return 0
        most = torch.tensor(len(hidden), device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        return int(most) - len(hidden)
