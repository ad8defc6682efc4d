"""Traces of Megatron's models name steps and their parts, in one stage and as virtual stages."""

from torch.profiler import ProfilerActivity, profile

from mor_layers import ExpertChoice, RecursionConfig
from tests.distributed import megatron_setup as setup
from tests.distributed.pipeline.pipeline_setup import (
    SEQUENCE_LENGTH,
    Case,
    build,
    forward_backward,
    initialize,
)

PARTS = {"mor/route", "mor/select", "mor/block", "mor/combine"}
CASE = Case(RecursionConfig(3, router=ExpertChoice()), block_size=2)


def names_of_a_trace(is_pipeline: bool) -> set[str]:
    initialize(CASE, is_pipeline)
    chunks = build(CASE, is_pipeline)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        forward_backward(chunks, setup.random_tokens(2, SEQUENCE_LENGTH))
    return {event.name for event in run.events() or () if event.name.startswith("mor/")}


def test_a_recursion_layer_names_steps_and_parts(pool):
    steps = {f"mor/step {step}" for step in (1, 2, 3)}
    (names,) = pool.run(names_of_a_trace, 1, is_pipeline=False)
    assert names == steps | PARTS | {"mor/write back"}
    first, last = pool.run(names_of_a_trace, 2, is_pipeline=True)
    assert first == steps | {"mor/route", "mor/select", "mor/block"}  # combined on the last rank
    assert last == steps | {"mor/select", "mor/block", "mor/combine"}  # decided on the first
