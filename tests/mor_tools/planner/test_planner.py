"""Seconds, links, utilization and memory of small layouts, worked out by hand.

The model has h = 8, two heads of 4, an MLP of 16 and 64 tokens; a sequence is 4 tokens long.

    parameters of a layer   norms 2 · 8 = 16, projections 4 · 8 · 8 = 256, MLP 3 · 8 · 16 = 384: 656
    around the layers       embedding and output 2 · 64 · 8 = 1024, last norm 8
    FLOPs of a layer        forward 2 · 4 · (256 + 384) + 4 · 4 · 4 · 8 = 5632, backward twice that
    FLOPs of the output     forward 2 · 4 · 8 · 64 = 4096, backward twice that
    bytes a layer keeps     of a token in bf16: norms 2 · 4 · 8 + 2 · 4 · 8 = 128, attention
                            2 · (3 · 8 + 3 · 8) = 96, MLP 2 · 5 · 16 = 160: 384; of 4 tokens 1536
    bytes the output keeps  4 · ((4 + 2 · 2) · 8 + 4 · 64) = 1280
"""

from dataclasses import replace

import pytest

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig
from mor_tools.planner import Hardware, Layout, Memory, Plan, Workload, evaluate
from mor_tools.planner.evaluate import _links

TOY = Hardware("toy", tflops=1e-6, memory_gib=1, intra_gbps=1e-6, inter_gbps=1e-7, per_node=2)
"""A million FLOP/s; 1000 bytes/s within a node and 100 beyond."""
FAST_LINKS = replace(TOY, intra_gbps=1e15, inter_gbps=1e15)
PLAIN = DecoderConfig(64, 8, 16, num_unrolled_layers=4, num_heads=2)
PARAMETERS = 4 * 656 + 1032
FORWARD = 4 * 5632 + 4096
"""Of a sequence."""


def recursive(router) -> DecoderConfig:
    """A prelude layer, 2 shared layers that run twice, and a coda layer."""
    return replace(PLAIN, num_unrolled_layers=6, recursion=RecursionConfig(2, router=router))


def test_one_device_computes_and_waits_for_nobody():
    plan = evaluate(Workload(PLAIN, 4, 2), Layout(), TOY, efficiency=0.25)
    flops = 2 * 3 * FORWARD
    assert plan.times == {
        "compute": pytest.approx(flops / 250_000),
        "communication": 0,
        "waiting": pytest.approx(0),
        "gradients": 0,
    }
    assert plan.utilization == pytest.approx(0.25)  # all that was reached is of use


def test_recomputed_products_take_time_and_are_no_use():
    work = Workload(PLAIN, 4, 2)
    plan = evaluate(work, Layout(recompute="full"), TOY, efficiency=1.0)
    again = 2 * 4 * 5632  # the layers' forward pass; the output's is not repeated
    assert plan.seconds == pytest.approx((2 * 3 * FORWARD + again) / 1e6)
    assert plan.utilization == pytest.approx(2 * 3 * FORWARD / (2 * 3 * FORWARD + again))
    attention = evaluate(work, Layout(recompute="selective"), TOY, efficiency=1.0)
    assert attention.seconds == pytest.approx((2 * 3 * FORWARD + 2 * 4 * 4 * 4 * 4 * 8) / 1e6)


def test_each_group_sends_over_the_slowest_link_among_its_ranks():
    layout = Layout(tensor=2, context=2, data=3, pipeline=2)
    slow, quick = 100, 1000
    # Ranks are laid out TP, CP, DP, PP: 2 neighbours, every second of 4, of 12, of 24.
    for per_node, expected in {
        1: {"tensor": slow, "context": slow, "data": slow, "pipeline": slow},
        2: {"tensor": quick, "context": slow, "data": slow, "pipeline": slow},
        4: {"tensor": quick, "context": quick, "data": slow, "pipeline": slow},
        12: {"tensor": quick, "context": quick, "data": quick, "pipeline": slow},
        24: {"tensor": quick, "context": quick, "data": quick, "pipeline": quick},
    }.items():
        links = _links(layout, replace(TOY, per_node=per_node))
        assert {axis: links[axis] for axis in expected} == pytest.approx(expected)
    assert _links(Layout(expert=2, data=4), TOY)["expert"] == pytest.approx(quick)
    assert _links(Layout(expert=4, data=4), TOY)["expert"] == pytest.approx(slow)


def test_seconds_of_communication_are_bytes_over_links():
    # Two nodes of two devices: tensor parallelism within a node, replicas across both.
    plan = evaluate(Workload(PLAIN, 4, 4), Layout(tensor=2, data=2), TOY, efficiency=1.0)
    states = 4 * 8 * 2  # bytes of a sequence's hidden states
    # A ring all-reduce between two sends as much as it reduces. Forward and backward: after
    # attention and MLP of 4 layers, and once after the embedding or before the output; three fp32
    # numbers a token for the loss.
    a_sequence = 2 * (2 * 4 * states + states) + 3 * 4 * 4
    held = 4 * (16 + (256 + 384) / 2) + 1024 / 2 + 8
    assert plan.times["compute"] == pytest.approx(2 * 3 * FORWARD / 2 / 1e6)
    assert plan.times["communication"] == pytest.approx(2 * a_sequence / 1000)
    assert plan.times["gradients"] == pytest.approx(held * 4 / 100)
    assert plan.times["waiting"] == pytest.approx(0)


def test_a_pipeline_waits_for_its_slowest_stage():
    plan = evaluate(Workload(PLAIN, 4, 2), Layout(pipeline=2), FAST_LINKS, efficiency=1.0)
    first, second = 2 * 5632, 2 * 5632 + 4096  # forward FLOPs of the stages; backward twice that
    # The second stage begins when one forward pass is done and never waits; the first ends with
    # the backward pass of the last microbatch.
    makespan = first + 2 * 3 * second + 2 * first
    assert plan.makespan == pytest.approx(makespan / 1e6)
    assert plan.times["compute"] == pytest.approx(2 * 3 * second / 1e6)
    assert plan.times["waiting"] == pytest.approx(3 * first / 1e6)
    assert plan.bubble == pytest.approx(1 - 2 * 3 * (first + second) / (2 * makespan))
    assert plan.utilization == pytest.approx(2 * 3 * FORWARD / (2 * makespan))
    assert [stage.busy for stage in plan.stages] == pytest.approx([0.067584, 0.09216])


def test_a_hop_takes_time_of_the_stage_that_sends():
    slow, fast = (
        evaluate(Workload(PLAIN, 4, 2), Layout(pipeline=2), machine, efficiency=1.0)
        for machine in (TOY, FAST_LINKS)
    )
    hop = 4 * 8 * 2 / 1000  # within a node; one forward or one backward for a microbatch
    for a, b in zip(slow.stages, fast.stages, strict=True):
        assert a.busy - b.busy == pytest.approx(2 * hop)


@pytest.mark.parametrize(
    ("is_bf16", "distributed", "expected"),
    [
        # bf16 weights, fp32 gradients, and an fp32 copy beside Adam's two moments.
        (True, False, (2, 4, 12)),
        (False, False, (4, 4, 8)),
        (True, True, (2, 4, 12 / 2)),
        (False, True, (4, 4, 8 / 2)),
    ],
)
def test_bytes_of_a_parameter_depend_on_precision_and_optimizer(is_bf16, distributed, expected):
    work = Workload(PLAIN, 4, 2, is_bf16, distributed)
    memory = evaluate(work, Layout(data=2), TOY).memory
    found = (memory.weights, memory.gradients, memory.optimizer)
    assert found == tuple(PARAMETERS * size for size in expected)


def activations(plan: Plan) -> list[float]:
    return [stage.memory.activations for stage in plan.stages]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_what_a_device_keeps_with_and_without_recomputation(micro_batch_size):
    work = Workload(recursive(FixedDepth()), 4, 6)
    layout = Layout(micro_batch_size=micro_batch_size)
    assert activations(evaluate(work, layout, TOY)) == [
        micro_batch_size * (6 * 1536 + 1280)  # the layers of prelude, two steps of two, coda
    ]
    # The states that enter prelude, recursion and coda; and once the output's, and what the
    # recursion keeps while it is computed again.
    recomputed = activations(evaluate(work, replace(layout, recompute="full"), TOY))
    assert recomputed == [micro_batch_size * (3 * 64 + 1280 + 4 * 1536)]


def test_what_stages_keep_of_microbatches_in_flight_with_and_without_recomputation():
    work, layout = Workload(recursive(FixedDepth()), 4, 8), Layout(pipeline=3)
    # 3, 2 and 1 microbatches are in flight; what arrives from the stage before is 64 bytes.
    assert activations(evaluate(work, layout, TOY)) == [
        3 * 1536,
        2 * (64 + 4 * 1536),
        64 + 1536 + 1280,
    ]
    assert activations(evaluate(work, replace(layout, recompute="full"), TOY)) == [
        3 * 64 + 1536,
        2 * (64 + 64) + 4 * 1536,
        64 + 64 + 1280 + 1536,
    ]


def test_what_routed_steps_keep():
    plan = evaluate(Workload(recursive(ExpertChoice()), 4, 1), Layout(), TOY)
    # 4 tokens run the first step and 2 the second; of each the gated output is kept: 2 · 8 bytes.
    # Both routers score 4 candidates, whose states they keep in fp32.
    scored = 2 * 4 * 4 * 8
    assert activations(plan) == [(4 + 2) * (2 * 384 + 2 * 8) + scored + 2 * 1536 + 1280]


def test_the_fullest_stage_speaks_for_a_plan():
    plan = evaluate(Workload(recursive(FixedDepth()), 4, 8), Layout(pipeline=3), TOY)
    assert plan.memory == max((s.memory for s in plan.stages), key=lambda memory: memory.total)
    assert plan.memory.total == sum(vars(plan.memory).values())
    assert isinstance(plan.memory, Memory)
    assert (
        plan.parameters == 2 * 656
    )  # those of the block; its neighbours hold 656 + 512 and 656 + 520
