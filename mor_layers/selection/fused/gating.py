"""Adding the gated output of a block to the residual stream, also in the rows it was taken from.

Plain PyTorch multiplies, adds, copies the stream and writes the rows into the copy; its backward pass
cuts the rows out of the gradient, and puts their gradients back into it. The kernel reads the output
once. As the stream itself enters the sum unchanged, its gradient is the one that arrives, and nothing
is copied in the backward pass.

Legend: `b` batch, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mor_layers.selection.fused.capability import fuses
from mor_layers.selection.tokens import put_rows, take_rows


def add_gated(
    values: Float[Tensor, "n b h"],
    output: Float[Tensor, "k b h"],
    gates: Float[Tensor, "k b"],
    rows: Int[Tensor, "k b"] | None = None,
    is_padding: Bool[Tensor, "k b"] | None = None,
) -> Float[Tensor, "n b h"]:
    """`values`, with `gates · output` added to the rows that the output was computed from.

    The gates are cast to the dtype of the output, and the product is rounded to it before it is added.
    A compiled kernel may join both operations and round once.

    Args:
        rows: the row of `values` for each row of the output, without repetition in a sequence. None: all
            rows in order, so that `n = k`.
        is_padding: True for rows of the output that are not added.
    """
    if fuses(values, output, gates, rows, is_padding):
        return AddGated.apply(values, output, gates, rows, is_padding)  # type: ignore[return-value]
    selected = values if rows is None else take_rows(values, rows)
    updated = selected + gates[..., None].to(output.dtype) * output
    if is_padding is not None:
        updated = torch.where(is_padding[..., None], selected, updated)
    return updated if rows is None else put_rows(values, updated, rows)


class AddGated(torch.autograd.Function):
    """`add_gated` by the kernel.

    The gradient of a gate is summed over its row by one program: nothing is atomic.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        values: Tensor,
        output: Tensor,
        gates: Tensor,
        rows: Tensor | None,
        is_padding: Tensor | None,
    ) -> Tensor:
        from mor_layers.selection.fused import kernels

        output, gates = output.contiguous(), gates.contiguous()
        rows = None if rows is None else rows.contiguous()
        is_padding = None if is_padding is None else is_padding.contiguous()
        ctx.save_for_backward(output, gates, rows, is_padding)
        return kernels.add_gated(values.contiguous(), output, gates, rows, is_padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from mor_layers.selection.fused import kernels

        of_output, of_gates = kernels.add_gated_backward(gradient.contiguous(), *ctx.saved_tensors)
        return gradient, of_output, of_gates, None, None
