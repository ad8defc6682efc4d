"""Divergence of vocab-parallel logits: any number of ranks gives the core's value and gradients."""

import pytest
import torch
from torch import Tensor

from mor_layers.training.distillation import logits_divergence
from mor_megatron.training import vocab_parallel_divergence
from tests.distributed.pool import WorkerPool

VOCABULARY, ROWS = 13, 16
"""The last rank's rows end in padding."""


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, 3, ROWS, generator=generator)


def on_a_rank(temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divergence of each token, and this rank's part of the gradient."""
    group = torch.distributed.group.WORLD
    assert group is not None
    student, teacher = (logits(seed).to(dtype).chunk(group.size(), -1) for seed in (0, 1))
    own = student[group.rank()].clone().requires_grad_()
    found = vocab_parallel_divergence(own, teacher[group.rank()], VOCABULARY, group, temperature)
    (found * torch.arange(1.0, 7.0).view(2, 3)).sum().backward()
    assert own.grad is not None and own.grad.dtype == dtype
    return found.detach(), own.grad.float()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ranks_agree_on_the_divergence_of_the_core(pool: WorkerPool, ranks, temperature):
    parts = pool.run(on_a_rank, ranks, temperature=temperature, dtype=torch.float32)
    student, teacher = logits(0).requires_grad_(), logits(1)
    teacher[..., VOCABULARY:] = -1e9  # no probability, and no 0 · inf
    expected = logits_divergence(student, teacher, temperature)
    (expected * torch.arange(1.0, 7.0).view(2, 3)).sum().backward()
    for found, _ in parts:
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([part for _, part in parts], dim=-1)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-5, atol=1e-6)


def test_logits_of_half_precision_are_compared_in_full(pool: WorkerPool):
    ((found, gradient),) = pool.run(on_a_rank, temperature=1.0, dtype=torch.bfloat16)
    student, teacher = (logits(seed).bfloat16().float() for seed in (0, 1))
    teacher[..., VOCABULARY:] = -1e9
    expected = logits_divergence(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()
