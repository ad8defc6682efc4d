"""Taking out selected rows and normalising them, which is how a layer begins.

Plain PyTorch reads the rows to copy them, and reads the copies to normalise them. The kernel writes
both results from one read. Its backward pass puts the gradients of both together in one write.

Legend: `b` batch, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mor_layers.selection.fused.capability import fuses
from mor_layers.selection.tokens import take_rows


class RMSNormWeight(NamedTuple):
    """An RMSNorm."""

    weight: Float[Tensor, " h"]
    epsilon: float


def rms_norm(hidden: Float[Tensor, "*t h"], norm: RMSNormWeight) -> Float[Tensor, "*t h"]:
    """RMSNorm in fp32, cast back before it is multiplied by the weight, as in Hugging Face's Llama."""
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=norm.epsilon)
    return normed.to(hidden) * norm.weight


def take_and_norm(
    values: Float[Tensor, "n b h"], rows: Int[Tensor, "k b"], norm: RMSNormWeight
) -> tuple[Float[Tensor, "k b h"], Float[Tensor, "k b h"]]:
    """`take_rows(values, rows)` as it is, and normalised by `rms_norm`.

    The first result is the same bit for bit with and without the kernel, and the second one is up to
    the rounding of a sum of squares. Rows must not repeat in a sequence.
    """
    if fuses(values, rows, norm.weight):
        return TakeAndNorm.apply(values, rows, *norm)  # type: ignore[return-value]
    selected = take_rows(values, rows)
    return selected, rms_norm(selected, norm)


class TakeAndNorm(torch.autograd.Function):
    """`take_and_norm` by the kernel.

    The backward pass writes each row of the gradient once, because rows do not repeat. The gradient of
    the weight is summed in a fixed order. So nothing is atomic, and everything is deterministic.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, values: Tensor, rows: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        from mor_layers.selection.fused import kernels

        rows, weight = rows.contiguous(), weight.contiguous()
        selected, normed, scales = kernels.take_and_norm(values.contiguous(), rows, weight, epsilon)
        ctx.save_for_backward(selected, scales, rows, weight)
        ctx.num_candidates = len(values)
        ctx.set_materialize_grads(False)
        return selected, normed

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, of_selected: Tensor | None, of_normed: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None, None]:
        from mor_layers.selection.fused import kernels

        selected, scales, rows, weight = ctx.saved_tensors
        if of_normed is None:
            if of_selected is None:
                return None, None, None, None
            of_normed = torch.zeros_like(
                selected, dtype=torch.promote_types(selected.dtype, weight.dtype)
            )
        of_values, of_weight = kernels.take_and_norm_backward(
            ctx.num_candidates,
            selected,
            scales,
            rows,
            weight,
            None if of_selected is None else of_selected.contiguous(),
            of_normed.contiguous(),
        )
        return of_values, None, of_weight, None
