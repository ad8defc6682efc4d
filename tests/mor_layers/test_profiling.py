"""A profiler's trace names the steps of a recursion and their parts; without one, names cost nothing."""

import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mor_layers import ExpertChoice, MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.profiling import named, named_range
from tests.mor_layers.small_models import VOCAB_SIZE, small_config

PARTS = ["mor/route", "mor/select", "mor/block", "mor/combine"]


@pytest.fixture
def model() -> MoRTransformer:
    torch.manual_seed(0)
    return MoRTransformer(small_config(ExpertChoice()))


def ranges(run: profile) -> list:
    """Our ranges of a trace, in the order in which they began."""
    events = (event for event in run.events() or () if event.name.startswith("mor/"))
    return sorted(events, key=lambda event: event.time_range.start)


def test_a_trace_has_each_step_and_its_four_parts_inside(model):
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        model(ids, labels=ids).loss.backward()
    expected = [name for step in (1, 2, 3) for name in (f"mor/step {step}", *PARTS)]
    found = ranges(run)
    assert [event.name for event in found] == [*expected, "mor/write back"]
    for event in found:
        if event.name in PARTS:
            assert event.cpu_parent.name.startswith("mor/step")
    steps = [event for event in found if event.name == "mor/step 1"]
    assert steps[0].cpu_time_total >= sum(child.cpu_time_total for child in steps[0].cpu_children)


def test_ticks_of_the_engine_are_named(model):
    engine = DepthBatchingEngine(model.eval(), CacheSettings.for_all_steps(model, max_length=16))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        list(engine.stream(Request((1, 2, 3), max_new_tokens=3)))
    names = [event.name for event in ranges(run)]
    assert names.count("mor/tick") >= 3
    assert {"mor/route", "mor/block", "mor/combine"} <= set(names)


def test_nothing_is_recorded_without_a_profiler(monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was recorded")

    monkeypatch.setattr("mor_layers.profiling.record_function", refuse)

    @named("mor/part")
    def part(x: int) -> int:
        return x + 1

    with named_range("mor/step 1"):
        assert part(1) == 2
    with pytest.raises(AssertionError, match="mor/part was recorded"), profile():
        part(1)


def test_names_break_no_graph(model):
    """`fullgraph` refuses what a compiled graph cannot hold."""

    @named("mor/part")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with named_range("mor/step 1"):
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(doubled, fullgraph=True, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
