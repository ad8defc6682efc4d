"""The schedule played through against formulas for equal stages, and counts against sums."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_layers.costs import account
from mor_layers.recursion import LoopLoss
from mor_megatron.parallel import even_stages
from mor_tools.planner import (
    HARDWARE,
    Layout,
    Plan,
    Workload,
    carried_rows,
    evaluate,
    refusal,
    timeline,
)
from mor_tools.planner.schedule import simulate
from mor_tools.planner.stages import place

SEQUENCE = 1024
FAST = replace(HARDWARE["h100"], intra_gbps=1e15, inter_gbps=1e15)
"""Links so fast that only matrix products take time."""


def decoder(router, steps: int = 3, block: int = 8, **recursion) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=1000,
        hidden_size=64,
        ffn_hidden_size=256,
        num_unrolled_layers=block * steps + 2,
        num_heads=4,
        recursion=RecursionConfig(steps, router=router, **recursion),
    )


def spread(stages: int, **options) -> Layout:
    return Layout(pipeline=stages, pipeline_layout="steps_as_stages", **options)


def planned(model: DecoderConfig, layout: Layout, batch: int = 8) -> Plan:
    return evaluate(Workload(model, SEQUENCE, batch), layout, FAST, efficiency=1.0)


def busy_flops(plan: Plan) -> float:
    """FLOPs of all stages' ranks."""
    return sum(stage.compute for stage in plan.stages) * FAST.tflops * 1e12


@pytest.mark.parametrize(
    ("stages", "microbatches"), [(1, 1), (1, 3), (2, 2), (4, 4), (4, 16), (8, 24)]
)
def test_equal_stages_wait_as_long_as_the_1f1b_formula_says(stages, microbatches) -> None:
    passes = simulate([[(1.0, 2.0)]] * stages, microbatches)
    assert max(run.end for run in passes) == 3 * (microbatches + stages - 1)


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches"), [(2, 2, 2), (2, 3, 4), (4, 2, 4), (4, 4, 16), (8, 3, 8)]
)
def test_equal_chunks_wait_as_long_as_the_interleaved_formula_says(
    stages, chunks, microbatches
) -> None:
    passes = simulate([[(1.0, 2.0)] * chunks] * stages, microbatches)
    assert max(run.end for run in passes) == 3 * (microbatches * chunks + stages - 1)
    assert len(passes) == 2 * stages * chunks * microbatches


def test_a_stage_does_one_thing_at_a_time_and_after_what_it_needs() -> None:
    passes = simulate([[(1.0, 2.5), (0.5, 1.0)], [(0.75, 2.0), (3.0, 1.0)]], 6)
    for stage in (0, 1):
        own = [run for run in passes if run.stage == stage]
        assert all(a.end <= b.start for a, b in pairwise(own))
    end = {(r.stage, r.chunk, r.microbatch, r.is_forward): r.end for r in passes}
    start = {(r.stage, r.chunk, r.microbatch, r.is_forward): r.start for r in passes}
    for m in range(6):
        way = [(0, 0), (1, 0), (0, 1), (1, 1)]
        steps = [(*at, m, True) for at in way] + [(*at, m, False) for at in way[::-1]]
        assert all(end[a] <= start[b] for a, b in pairwise(steps))


def best_division(depths: Sequence[int], size: int) -> int:
    """Layers of the deepest stage, of the best of all divisions."""
    cuts = combinations(range(1, len(depths)), size - 1)
    borders = ((0, *own, len(depths)) for own in cuts)
    return min(max(sum(depths[a:b]) for a, b in pairwise(own)) for own in borders)


@pytest.mark.parametrize(
    "depths", [(1,), (1, 30, 1), (3, 3, 3, 3), (1, 9, 2, 5, 1, 1, 8), (1, 1, 1, 1, 1, 1, 7, 1)]
)
def test_stages_are_divided_as_evenly_as_any_division_is(depths) -> None:
    for size in range(1, len(depths) + 1):
        stages = even_stages(depths, size)
        assert len(stages) == size and all(stages)
        assert tuple(depth for stage in stages for depth in stage) == depths
        assert max(map(sum, stages)) == best_division(depths, size)


def test_more_stages_than_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 9, 1 unrolled layers\).*between 1 and 3 stages"):
        even_stages((1, 9, 1), 4)


def test_a_1f1b_stage_keeps_as_many_microbatches_as_stages_follow() -> None:
    model = decoder(FixedDepth(), steps=2)
    many, single = (planned(model, Layout(pipeline=3), batch) for batch in (8, 1))
    ratios = [
        a.memory.activations / b.memory.activations
        for a, b in zip(many.stages, single.stages, strict=True)
    ]
    assert ratios == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("router", [FixedDepth(), ExpertChoice(), ExpertChoice("mlp")])
@pytest.mark.parametrize("tie", [False, True])
def test_stages_hold_the_model_once_and_do_its_work(router, tie: bool) -> None:
    model = replace(decoder(router), tie_embeddings=tie)
    cost = account(model, SEQUENCE)
    twice = model.vocab_size * model.hidden_size if tie else 0  # the last stage has a copy
    for layout in (spread(4), Layout(pipeline=2)):
        plan = planned(model, layout)
        assert sum(s.parameters for s in plan.stages) == cost.parameters.total + twice
        assert busy_flops(plan) == pytest.approx(8 * cost.training.total)
        assert 0 < plan.bubble < 1


def test_stages_hold_a_prelude_and_a_coda_of_any_length() -> None:
    recursion = RecursionConfig(3, router=ExpertChoice(), prelude_layers=2, coda_layers=3)
    model = replace(decoder(ExpertChoice()), num_unrolled_layers=2 + 24 + 3, recursion=recursion)
    cost = account(model, SEQUENCE)
    for layout in (spread(4), Layout(pipeline=2), Layout(pipeline=6)):
        plan = planned(model, layout)
        assert sum(s.parameters for s in plan.stages) == cost.parameters.total
        assert busy_flops(plan) == pytest.approx(8 * cost.training.total)
    # Six parts are the most: two layers, the recursion, three layers.
    assert refusal(Workload(model, SEQUENCE, 8), Layout(pipeline=6)) is None
    assert refusal(Workload(model, SEQUENCE, 8), Layout(pipeline=7)) is not None


def test_stages_hold_several_recursions_each_whole() -> None:
    recursions = (
        RecursionConfig(3, router=TokenChoice(), block_layers=4),
        RecursionConfig(2, "sequence", block_layers=2),
        RecursionConfig(2, "cycle", ExpertChoice(), coda_layers=1, block_layers=3),
    )
    model = replace(decoder(ExpertChoice()), num_unrolled_layers=14 + 4 + 7, recursion=recursions)
    work = Workload(model, SEQUENCE, 8)
    for layout in (Layout(), Layout(pipeline=2), Layout(pipeline=7)):
        plan = planned(model, layout)
        assert sum(s.parameters for s in plan.stages) == work.cost.parameters.total
        assert busy_flops(plan) == pytest.approx(8 * work.cost.training.total)
    # Seven parts are the most: 1, 3 × 4 and 1 layers, two layers that repeat, 2 × 3 and 1 layers.
    assert refusal(work, Layout(pipeline=7)) is None
    assert refusal(work, Layout(pipeline=8)) is not None
    assert refusal(work, spread(2)) == "pipeline: the steps of several recursions"


def test_layers_that_balance_depth_are_on_one_stage_up_to_an_anchor() -> None:
    router = ExpertChoice(capacity_factors=(0.25,))
    recursion = RecursionConfig(1, "middle_sequence", router, anchor_every=3, depth_balance=0.1)
    model = replace(decoder(FixedDepth()), num_unrolled_layers=1 + 9 + 1, recursion=recursion)
    work = Workload(model, SEQUENCE, 8)
    assert work.part_depths == (1, 3, 3, 3, 1)
    placed = place(work.shape, "one_stage", 3, work.part_depths)
    assert [sum(part.layers for part in parts) for (parts,) in placed] == [4, 3, 4]
    plan = planned(model, Layout(pipeline=3))
    assert sum(s.parameters for s in plan.stages) == work.cost.parameters.total
    assert busy_flops(plan) == pytest.approx(8 * work.cost.training.total)
    assert refusal(work, Layout(pipeline=5)) is None
    assert refusal(work, Layout(pipeline=6)) == "pipeline: more stages than parts"


def test_steps_as_stages_divide_the_block_and_shrink_the_bubble() -> None:
    model = decoder(ExpertChoice(), block=16)
    divided, whole = planned(model, spread(4), 16), planned(model, Layout(pipeline=3), 16)
    assert max(s.parameters for s in divided.stages) < 0.5 * whole.parameters
    assert divided.bubble < 0.3 < whole.bubble


def test_traffic_counts_every_hop_of_every_microbatch() -> None:
    model = decoder(FixedDepth())
    plan = planned(model, spread(4))
    hops = 4 * 3 - 1  # of a microbatch through 4 stages, 3 times
    total = sum(stage.traffic["pipeline", "send"] for stage in plan.stages)
    assert total == 2 * hops * 8 * SEQUENCE * model.hidden_size * 2


def test_recomputation_keeps_inputs_only_and_costs_a_forward_pass() -> None:
    model = decoder(ExpertChoice())
    kept, again = (planned(model, spread(4, recompute=how)) for how in ("none", "full"))
    assert again.stages[0].memory.activations < 0.3 * kept.stages[0].memory.activations
    # Everything but the logits runs once more.
    logits = 8 * account(model, SEQUENCE).forward.output
    more = 8 * account(model, SEQUENCE).forward.total - logits
    assert busy_flops(again) - busy_flops(kept) == pytest.approx(more)


def test_token_choice_is_taken_to_let_equally_many_tokens_exit_at_each_step() -> None:
    model = decoder(TokenChoice())
    expected = Workload(model, 900, 8, tokens_per_step=(900, 600, 300)).cost
    assert Workload(model, 900, 8).cost == expected
    assert Workload(model, 900, 8, tokens_per_step=(900, 700, 300)).cost != expected


def test_what_travels_grows_with_what_is_planned() -> None:
    def rows(router, layout: Layout, itemsize: int = 2) -> int:
        return carried_rows(Workload(decoder(router), 1000, 8, itemsize == 2), layout)

    assert rows(ExpertChoice(), Layout(pipeline=2)) == 1000
    lengths = [rows(router, spread(4)) for router in (FixedDepth(), ExpertChoice(), TokenChoice())]
    assert lengths == [1000, 2000 + 63, 2000 + 94]  # words of 4 bytes in rows of 64 * 2
    shared = spread(4, tensor=8, sequence_parallel=True)
    assert rows(ExpertChoice(), shared, 4) == 2000 + 8 * 32


def test_documents_travel_with_their_tokens() -> None:
    work = Workload(decoder(ExpertChoice(capacity_factors=(0.5, 0.5, 0.5))), 1000, 8)
    # Half of the tokens, and for each a position and a gate; a word more for the document of each token
    # of the sequence, and room for all tokens, because how many of a document run is not known before.
    assert carried_rows(work, spread(4)) == 1000 + 500 + 32  # 1001 words of 4 bytes
    documents = replace(work, documents=True)
    assert carried_rows(documents, spread(4)) == 1000 + 1000 + 94  # 3001 words


def test_the_states_of_all_loops_are_sent_after_a_recursion_in_one_stage() -> None:
    loops = 3
    model = decoder(FixedDepth(), loops)
    every_loop = decoder(FixedDepth(), loops, loop_loss=LoopLoss())

    def sent(model: DecoderConfig, layout: Layout) -> float:
        stages = evaluate(Workload(model, SEQUENCE, 8), layout, FAST).stages
        return sum(stage.traffic["pipeline", "send"] for stage in stages)

    # Three stages: prelude, block, coda. One loop from the first to the second, all to the third.
    three = Layout(pipeline=3)
    assert sent(every_loop, three) == sent(model, three) * (1 + loops) / 2
    assert sent(every_loop, spread(4)) == sent(model, spread(4))
    # An earlier recursion is not read out after every loop.
    last = RecursionConfig(loops, "cycle", loop_loss=LoopLoss(), coda_layers=1, block_layers=4)
    both = (RecursionConfig(2, "cycle", block_layers=4), last)
    several = replace(model, recursion=both, num_unrolled_layers=8 + 12 + 1)
    assert sent(several, three) == sent(every_loop, three)


def test_the_timeline_is_the_schedule_that_is_evaluated() -> None:
    work, layout = Workload(decoder(ExpertChoice()), SEQUENCE, 8), spread(4)
    passes, plan = timeline(work, layout, FAST), evaluate(work, layout, FAST)
    assert max(run.end for run in passes) == plan.makespan
    for number, stage in enumerate(plan.stages):
        own = [run.end - run.start for run in passes if run.stage == number]
        assert sum(own) == pytest.approx(stage.busy)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (spread(3), "pipeline: the block cannot be split evenly"),
        (spread(16), "pipeline: the block cannot be split evenly"),
        (spread(4), "pipeline: micro-batches are not a multiple of the stages"),
        (spread(1), "pipeline: no repeated steps of a block"),
        (Layout(pipeline=4), "pipeline: more stages than parts"),
        (Layout(pipeline=3), None),
    ],
)
def test_what_does_not_spread_is_refused(layout: Layout, reason: str | None) -> None:
    assert refusal(Workload(decoder(ExpertChoice()), SEQUENCE, 6), layout) == reason
