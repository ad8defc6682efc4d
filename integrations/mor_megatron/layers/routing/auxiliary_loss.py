"""How the routers' losses reach their parameters although the loss is computed on another stage.

As in Megatron's MoE, an auxiliary loss is attached to the hidden states: their backward pass also
starts the backward pass of the loss. It must be scaled like the language-model loss (by the number
of microbatches and the loss scale). Megatron's schedules announce that scale once per microbatch to
`config.experimental_attention_variant_loss_scale_func`.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RouterLossScaler(torch.autograd.Function):
    """Identity on the hidden states whose backward pass adds the gradient of a loss."""

    scale: Tensor | None = None
    """Factor by which the language-model loss of the current microbatch is multiplied."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        gradient = torch.ones_like(loss)
        if RouterLossScaler.scale is not None:
            gradient = gradient * RouterLossScaler.scale.to(loss)
        return gradients[0], gradient

    @classmethod
    def set_loss_scale(cls, scale: Tensor) -> None:
        """Called by the schedule before each backward pass.

        The scale is written to the same place every time, where a CUDA graph of a backward pass reads
        it.
        """
        scale = scale.detach().reshape(())
        if cls.scale is None or (cls.scale.device, cls.scale.dtype) != (scale.device, scale.dtype):
            cls.scale = scale.clone()
        else:
            cls.scale.copy_(scale)


class _LossScaleFunctions:
    """Calls the function that was configured before, then ours."""

    def __init__(self, earlier: Callable[[Tensor], None] | None) -> None:
        self.earlier = earlier

    def __call__(self, scale: Tensor) -> None:
        if self.earlier is not None:
            self.earlier(scale)
        RouterLossScaler.set_loss_scale(scale)


def listen_for_loss_scale(config: TransformerConfig) -> None:
    """Make the schedules pass the loss scale to `RouterLossScaler`; a second call changes nothing."""
    earlier = config.experimental_attention_variant_loss_scale_func
    if isinstance(earlier, _LossScaleFunctions):
        return
    if earlier is None and config.experimental_attention_variant == "dsa":
        # Megatron falls back to this function where the user has set none
        # (pipeline_parallel/schedules.py), so it must still be called.
        from megatron.core.transformer.experimental_attention_variant.dsa import (
            DSAIndexerLossAutoScaler,
        )

        earlier = DSAIndexerLossAutoScaler.set_loss_scale
    config.experimental_attention_variant_loss_scale_func = _LossScaleFunctions(earlier)
