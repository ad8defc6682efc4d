"""How routers' losses reach their parameters when the loss is computed on another stage.

As for Megatron's MoE, a loss is hung onto hidden states that pass by: the backward pass through
them sets off its own. Its scale must be the one of the language-model loss (number of microbatches,
loss scaling), which Megatron's schedules announce once per microbatch to
`config.experimental_attention_variant_loss_scale_func`.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RouterLossScaler(torch.autograd.Function):
    """Identity on hidden states; its backward pass adds the gradient of a loss."""

    scale: Tensor | None = None
    """What the language-model loss of the current microbatch is multiplied by."""

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
        """Called by the schedule before each backward pass."""
        cls.scale = scale.detach().reshape(())


class _LossScaleFunctions:
    """What the schedule calls: the function that was there, then ours."""

    def __init__(self, earlier: Callable[[Tensor], None] | None) -> None:
        self.earlier = earlier

    def __call__(self, scale: Tensor) -> None:
        if self.earlier is not None:
            self.earlier(scale)
        RouterLossScaler.set_loss_scale(scale)


def listen_for_loss_scale(config: TransformerConfig) -> None:
    """Let the schedules tell `RouterLossScaler` the loss scale. Once is enough."""
    earlier = config.experimental_attention_variant_loss_scale_func
    if isinstance(earlier, _LossScaleFunctions):
        return
    if earlier is None and config.experimental_attention_variant == "dsa":
        # Without a function of the user's, schedules.py:280 falls back to this one.
        from megatron.core.transformer.experimental_attention_variant.dsa import (
            DSAIndexerLossAutoScaler,
        )

        earlier = DSAIndexerLossAutoScaler.set_loss_scale
    config.experimental_attention_variant_loss_scale_func = _LossScaleFunctions(earlier)
