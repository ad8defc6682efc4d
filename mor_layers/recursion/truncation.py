"""Truncated backpropagation through the steps of a recursion.

Steps before a router's `first_trained_step` run without gradients. The states that they hand on are
cut off, so that the backward pass ends there.

Legend: `n` candidates of a step, `b` batch, `w` numbers that a token carries.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def cut(
    states: Float[Tensor, "n b w"], block: nn.Module, *inputs: Tensor
) -> Float[Tensor, "n b w"]:
    """The states without what came before.

    Parameters that only earlier steps use get a gradient of zero, because frameworks that reduce
    gradients while the backward pass runs wait for every parameter.

    Args:
        states: what goes on.
        block: the module whose parameters get a gradient of zero.
        inputs: tensors that get a gradient of zero too, because something waits for their gradients.
    """
    if not torch.is_grad_enabled():
        return states
    trained = [tensor for tensor in (*block.parameters(), *inputs) if tensor.requires_grad]
    return _Cut.apply(states.detach(), *trained)  # type: ignore[return-value]


class _Cut(torch.autograd.Function):
    """Returns its first input, and gives all others gradients of zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)
        return (None, *zeros)
