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
from mor_layers.recursion import HistoryInjection, HyperConnections
from mor_layers.routers import AdaptiveHalting, DampedLoops
from mor_megatron.parallel import CarriedRows
from mor_tools.planner.schedule import simulate

# Of 8 tokens in rows of 24 numbers, fp32 on one rank and bf16 on each of four. Behind them travel the
# tokens that run the first step, and for each of these a position, a gate if it has one and what is
# planned for it, in words of 4 bytes; one word says how many they are.
TRAVELS = [
    (FixedDepth(), 8, 8),
    # floor(0.7 · 8) = 5 tokens, 1 + 5 words: a row of 96 bytes; 2 tokens and a row of 48 on each rank.
    (RandomDepth((0.7, 0.5, 0.1)), 8 + 5 + 1, 8 + 4 * (2 + 1)),
    # 1 + 8 · 2 words are 68 bytes: a row, or two.
    (ExpertChoice(), 8 + 8 + 1, 8 + 4 * (2 + 2)),
    # floor(0.5 · 8) = 4 tokens become 6; 1 + 6 · 2 words are a row, or 2 · 3 rows of tokens and words.
    (
        ExpertChoice(capacity_factors=(0.5, 0.3, 0.1), capacity_multiple=3),
        8 + 6 + 1,
        8 + 4 * (2 + 2),
    ),
    (ExpertChoice(warmup_steps=5), 8 + 8 + 1, 8 + 4 * (2 + 2)),
    # Two numbers planned for each token: 1 + 8 · 3 words are 100 bytes.
    (TokenChoice(), 8 + 8 + 2, 8 + 4 * (2 + 3)),
    # A number for each of three steps: 1 + 8 · 4 words are 132 bytes.
    (DepthAndWidth(), 8 + 8 + 2, 8 + 4 * (2 + 3)),
    # Positions alone: 1 + 8 words are 36 bytes.
    (DampedLoops(), 8 + 8 + 1, 8 + 4 * (2 + 1)),
    # Any of them may run.
    (RandomLoops(), 8 + 8 + 1, 8 + 4 * (2 + 1)),
]


@pytest.mark.parametrize(("router", "alone", "shared"), TRAVELS, ids=lambda value: repr(value)[:40])
def test_what_travels_takes_as_many_rows_as_its_parts(router, alone: int, shared: int) -> None:
    settings = RecursionConfig(3, router=router)
    for itemsize, ranks, expected in ((4, 1, alone), (2, 4, shared)):
        rows = CarriedRows.of(settings, 24, itemsize, ranks, documents=False)
        assert rows.carried_length(8) == expected


@pytest.mark.parametrize("router", [router for router, *_ in TRAVELS], ids=lambda r: repr(r)[:40])
def test_a_sequence_is_known_by_the_rows_that_travel(router) -> None:
    rows = CarriedRows.of(RecursionConfig(3, router=router), 24, 2, 4, documents=False)
    for length in (8, 20, 400):
        assert rows.sequence_length(rows.carried_length(length) // 4) == length


@pytest.mark.parametrize("context", [2, 3])
def test_a_sequence_split_by_context_is_known_by_the_rows_that_travel(context: int) -> None:
    settings = RecursionConfig(3, router=TokenChoice(), hyper_connections=HyperConnections(3))
    for shards in (1, 2):
        rows = CarriedRows.of(settings, 24, 4, context * shards, False, context)
        for length in (12, 24, 120):
            carried = rows.carried_length(length)
            assert carried % (2 * context) == carried % (context * shards) == 0
            assert rows.sequence_length(carried // (context * shards)) == length


def test_what_tokens_carry_between_steps_takes_rows_of_its_own() -> None:
    def rows(**options) -> int:
        settings = RecursionConfig(3, router=TokenChoice(), **options)
        return CarriedRows.of(settings, 24, 4, 1, documents=False).carried_length(8)

    # 1 + 8 · 3 words are 100 bytes, of which a row has 96. Two streams: 4 more words for each token,
    # that is 1 + 8 · 7. A window of one: another state, and the gate of the step, 1 + 8 · 4 words.
    assert rows() == 2 * 8 + 2
    assert rows(hyper_connections=HyperConnections(2)) == 2 * 2 * 8 + 3
    assert rows(history=HistoryInjection(1)) == 2 * 2 * 8 + 2
    halting = RecursionConfig(3, router=AdaptiveHalting())  # two states, and two numbers planned
    carried = CarriedRows.of(halting, 24, 4, 1, documents=False).carried_length(8)
    assert carried == 2 * 2 * 8 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_between", [False, True])
def test_what_travels_arrives_bit_by_bit_and_so_do_gradients(dtype, is_between: bool) -> None:
    from mor_megatron.pipeline.state import CarriedLayout, CarriedState

    settings = RecursionConfig(3, router=TokenChoice(), hyper_connections=HyperConnections(2))
    layout = CarriedLayout.of(settings, 10, dtype.itemsize, 1, documents=True)
    s, b, k = 9, 2, 5
    full = torch.randn(s, b, 20, dtype=dtype, requires_grad=True)
    rows = torch.randn(k, b, 20 if is_between else 10, dtype=dtype, requires_grad=True)
    plan = (torch.rand(k, b, 2) * 1e-30).requires_grad_()
    notes = (torch.rand(k, b, 4) * 1e-30).requires_grad_()
    order = torch.rand(s, b).argsort(dim=0)[:k].sort(dim=0).values
    document = (torch.arange(s)[:, None] // torch.tensor([3, 4])).expand(s, b)
    sequence = Tokens.whole_sequence(s, b, None, document, torch.rand(s, b) < 0.3)
    tokens = sequence.take(order, torch.rand(k, b) < 0.5)
    state = CarriedState(full, rows, RoutingDecision(tokens, plan=plan), notes)
    carried = layout.pack(state, 1, sequence)
    assert len(carried) == layout.carried_length(s)
    arrived = layout.sequence(carried)
    found = layout.unpack(carried, 1, arrived, is_between)
    for name in ("positions", "documents", "is_padding", "document_lengths"):
        assert torch.equal(getattr(arrived, name), getattr(sequence, name))
        assert torch.equal(getattr(found.decision.tokens, name), getattr(tokens, name))
    pairs = [(found.full, full), (found.rows, rows), (found.decision.plan, plan)]
    pairs.append((found.notes, notes))
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
