"""The schedule played through against formulas for equal stages, and counts against sums."""

from dataclasses import replace
from itertools import pairwise

import pytest

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_layers.costs import account
from mor_tools.planner import PipelinePlan, pipeline_account
from mor_tools.planner.pipeline import carried_length
from mor_tools.planner.schedule import simulate

SEQUENCE = 1024


def decoder(router, steps: int = 3, block: int = 8, **recursion) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=1000,
        hidden_size=64,
        ffn_hidden_size=256,
        num_unrolled_layers=block * steps + 2,
        num_heads=4,
        recursion=RecursionConfig(steps, router=router, **recursion),
    )


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


def test_a_1f1b_stage_keeps_as_many_microbatches_as_stages_follow() -> None:
    model = decoder(FixedDepth(), steps=2)
    plan = PipelinePlan("one_stage", stages=3, num_microbatches=8)
    result = pipeline_account(model, plan, SEQUENCE)
    alone = PipelinePlan("one_stage", stages=3, num_microbatches=1)
    single = pipeline_account(model, alone, SEQUENCE)
    ratios = [
        many.activation_bytes / one.activation_bytes
        for many, one in zip(result.stages, single.stages, strict=True)
    ]
    assert ratios == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("router", [FixedDepth(), ExpertChoice(), ExpertChoice("mlp")])
@pytest.mark.parametrize("tie", [False, True])
def test_stages_hold_the_model_once_and_do_its_work(router, tie: bool) -> None:
    model = decoder(router)
    if tie:
        model = replace(model, tie_embeddings=True)
    cost = account(model, SEQUENCE)
    twice = model.vocab_size * model.hidden_size if tie else 0  # the last stage has a copy
    for plan in (
        PipelinePlan("steps_as_stages", stages=4, num_microbatches=8),
        PipelinePlan("one_stage", stages=2, num_microbatches=8),
    ):
        result = pipeline_account(model, plan, SEQUENCE)
        assert sum(s.parameters for s in result.stages) == cost.parameters.total + twice
        assert sum(s.busy for s in result.stages) == pytest.approx(8 * cost.training.total)
        assert 0 < result.bubble < 1


def test_steps_as_stages_divide_the_block_and_shrink_the_bubble() -> None:
    model = decoder(ExpertChoice(), block=16)
    spread = pipeline_account(model, PipelinePlan("steps_as_stages", 4, 16), SEQUENCE)
    whole = pipeline_account(model, PipelinePlan("one_stage", 3, 16), SEQUENCE)
    assert max(s.parameters for s in spread.stages) < 0.5 * max(s.parameters for s in whole.stages)
    assert spread.bubble < 0.3 < whole.bubble


def test_traffic_counts_every_hop_of_every_microbatch() -> None:
    model = decoder(FixedDepth())
    result = pipeline_account(model, PipelinePlan("steps_as_stages", 4, 8), SEQUENCE)
    hops = 4 * 3 - 1  # of a microbatch through 4 stages, 3 times
    assert result.carried_rows == SEQUENCE
    total = sum(stage.sent_bytes for stage in result.stages)
    assert total == 2 * hops * 8 * SEQUENCE * model.hidden_size * 2


def test_recomputation_keeps_inputs_only_and_costs_a_forward_pass() -> None:
    model = decoder(ExpertChoice())
    kept = pipeline_account(model, PipelinePlan("steps_as_stages", 4, 8), SEQUENCE)
    again = pipeline_account(model, PipelinePlan("steps_as_stages", 4, 8, recompute=True), SEQUENCE)
    assert again.stages[0].activation_bytes < 0.3 * kept.stages[0].activation_bytes
    assert sum(s.busy for s in again.stages) == pytest.approx(
        4 / 3 * sum(s.busy for s in kept.stages), rel=0.05
    )


def test_token_choice_needs_to_be_told_how_many_tokens_run() -> None:
    plan = PipelinePlan("steps_as_stages", 4, 8)
    with pytest.raises(ValueError, match="Give tokens_per_step"):
        pipeline_account(decoder(TokenChoice()), plan, SEQUENCE)
    result = pipeline_account(decoder(TokenChoice()), plan, SEQUENCE, (1024, 700, 300))
    assert result.carried_rows > 2 * SEQUENCE


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PipelinePlan("steps_as_stages", 3, 9), "Use a block of 6 or 9 layers"),
        (PipelinePlan("steps_as_stages", 16, 16), "Use a block of 16 layers"),
        (PipelinePlan("steps_as_stages", 4, 6), "must be a multiple of 4 stages"),
        (PipelinePlan("steps_as_stages", 1, 1), "nothing goes round"),
        (PipelinePlan("one_stage", 4, 8), "Use 3 stages or fewer"),
    ],
)
def test_what_does_not_spread_is_refused(plan: PipelinePlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_account(decoder(ExpertChoice()), plan, SEQUENCE)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Use one of one_stage, steps_as_stages"):
        PipelinePlan("elsewhere", 2, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stages=0 must be at least 1"):
        PipelinePlan("one_stage", 0, 2)
    plain = DecoderConfig(10, 8, 8, 2, 2)
    with pytest.raises(ValueError, match="only a model with cycle or middle_cycle"):
        pipeline_account(plain, PipelinePlan("one_stage", 2, 2), 8)


def test_what_travels_grows_with_what_is_planned() -> None:
    lengths = [
        carried_length(RecursionConfig(3, router=router), 64, 1000)
        for router in (FixedDepth(), ExpertChoice(), TokenChoice())
    ]
    assert lengths == [1000, 2000 + 63, 2000 + 94]  # words of 4 bytes in rows of 64 * 2
    assert (
        carried_length(RecursionConfig(3, router=ExpertChoice()), 64, 1000, 4, 8) == 2000 + 8 * 32
    )
