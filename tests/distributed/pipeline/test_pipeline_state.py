"""What travels between stages arrives bit by bit, and what is counted is what runs."""

from types import SimpleNamespace

import pytest
import torch

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    RoutingDecision,
    TokenChoice,
    Tokens,
)
from mor_tools.planner.pipeline import carried_length as accounted_length
from mor_tools.planner.schedule import simulate

ALL_ROUTERS = [
    FixedDepth(),
    RandomDepth((0.7, 0.5, 0.1)),
    ExpertChoice(),
    ExpertChoice(warmup_steps=5),
    TokenChoice(),
    DepthAndWidth(),
    RandomLoops(),
]


@pytest.mark.parametrize("router", ALL_ROUTERS, ids=lambda router: repr(router)[:40])
@pytest.mark.parametrize(("itemsize", "ranks"), [(4, 1), (2, 1), (2, 4)])
def test_what_is_counted_is_what_travels(router, itemsize: int, ranks: int) -> None:
    from mor_megatron.pipeline.state import CarriedLayout

    settings = RecursionConfig(3, router=router)
    layout = CarriedLayout.of(settings, 24, itemsize, ranks, documents=False)
    for length in (8, 20, 400):
        expected = accounted_length(settings, 24, length, itemsize, ranks)
        assert layout.carried_length(length) == expected
        assert layout.sequence_length(expected // ranks) == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_travels_arrives_bit_by_bit_and_so_do_gradients(dtype: torch.dtype) -> None:
    from mor_megatron.pipeline.state import CarriedLayout, CarriedState

    settings = RecursionConfig(3, router=TokenChoice())
    layout = CarriedLayout.of(settings, 10, dtype.itemsize, 1, documents=True)
    s, b, k = 9, 2, 5
    full = torch.randn(s, b, 10, dtype=dtype, requires_grad=True)
    rows = torch.randn(k, b, 10, dtype=dtype, requires_grad=True)
    plan = (torch.rand(k, b, 2) * 1e-30).requires_grad_()
    order = torch.rand(s, b).argsort(dim=0)[:k].sort(dim=0).values
    numbers = torch.arange(s * b).view(s, b)
    tokens = Tokens(order, s, numbers[:k], torch.rand(k, b) < 0.5, numbers[:k] + 70000)
    state = CarriedState(full, rows, RoutingDecision(tokens, plan=plan))
    carried = layout.pack(state, 1)
    assert len(carried) == layout.carried_length(s)
    found = layout.unpack(carried, 1)
    for name in ("positions", "documents", "is_padding", "document_lengths"):
        assert torch.equal(getattr(found.decision.tokens, name), getattr(tokens, name))
    pairs = [(found.full, full), (found.rows, rows), (found.decision.plan, plan)]
    gradients = [torch.randn_like(theirs) for _, theirs in pairs]
    torch.autograd.backward([ours for ours, _ in pairs], gradients)
    for (ours, theirs), gradient in zip(pairs, gradients, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(theirs.grad, gradient)


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(2, 2, 4), (4, 3, 8), (4, 1, 6)])
def test_the_schedule_that_is_counted_is_megatrons(stages, chunks, microbatches) -> None:
    from megatron.core.pipeline_parallel import schedules

    passes = simulate([[(1.0, 2.0)] * chunks] * stages, microbatches)
    group = stages if chunks > 1 else microbatches
    table = schedules.get_schedule_table(microbatches, chunks, group)
    for rank in range(stages):
        own = [run for run in passes if run.stage == rank]
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda rank=rank: rank),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(
            microbatches, chunks, group, p2p_communicator=communicator
        )
        forward = [(run.microbatch, run.chunk) for run in own if run.is_forward]
        backward = [(run.microbatch, chunks - 1 - run.chunk) for run in own if not run.is_forward]
        assert forward == backward == table
        before = [run.is_forward for run in own].index(False)
        assert before == min(warmup + 1, len(table))
