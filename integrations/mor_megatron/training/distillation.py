"""Divergence between vocab-parallel logits of a teacher and a student.

Legend: `v` rows of the vocabulary on this rank, padding included.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def vocab_parallel_divergence(
    student: Float[Tensor, "*tokens v"],
    teacher: Float[Tensor, "*tokens v"],
    vocab_size: int,
    group: ProcessGroup,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """`T² · KL(teacher ‖ student)` in nats of each token, in fp32; the same on every rank.

    The gradient flows to the student's logits. The teacher's distribution excludes padding of the
    vocabulary, and probability that the student gives to padding counts against it, as in Megatron's
    cross entropy.

    Args:
        vocab_size: number of rows of the whole vocabulary that are tokens; later rows are padding.
        group: tensor-parallel ranks, in the order of their rows.
    """
    return _Divergence.apply(student, teacher, vocab_size, group, temperature)


class _Divergence(torch.autograd.Function):
    """The backward pass needs no communication: `T² · (q - p) / T` on each rank's own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        vocab_size: int,
        group: ProcessGroup,
        temperature: float,
    ) -> Tensor:
        rows = student.shape[-1]
        is_token = torch.arange(rows, device=student.device) + rows * group.rank() < vocab_size
        log_q = _log_softmax(student.float() / temperature, group)
        scaled = (teacher.float() / temperature).masked_fill(~is_token, -torch.inf)
        log_p = _log_softmax(scaled, group)
        p = log_p.exp()
        # `where` and not a product: rows of padding would give 0 · inf.
        divergence = torch.where(is_token, p * (log_p - log_q), 0.0).sum(dim=-1)
        torch.distributed.all_reduce(divergence, group=group)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return temperature**2 * divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (difference,) = ctx.saved_tensors
        gradient = ctx.temperature * gradients[0][..., None] * difference
        return gradient.to(ctx.dtype), None, None, None, None


def _log_softmax(logits: Tensor, group: ProcessGroup) -> Tensor:
    highest = logits.amax(dim=-1, keepdim=True)
    torch.distributed.all_reduce(highest, op=ReduceOp.MAX, group=group)
    logits = logits - highest
    total = logits.exp().sum(dim=-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - total.log()
