"""Every setting of a model is served exactly, in both kinds of ticks, or refused by name."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings

from mor_layers import DecoderConfig, MoRTransformer, from_mapping
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, with_early_exit
from mor_layers.models import ROPE_SCALINGS
from mor_layers.routers import Criterion
from tests.mor_layers.generation.every_setting import (
    NOT_A_GRAPH,
    REFUSED,
    SERVED,
    all_configs,
    values_by_setting,
)
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt
from tests.mor_layers.generation.test_early_exit import CRITERIA
from tests.mor_layers.random_configs import OURS, decoders
from tests.mor_layers.small_models import small_config, small_model

REQUESTS = [Request(prompt(length, length), count) for length, count in ((5, 2), (1, 4), (2, 3))]


def assert_served(
    model: MoRTransformer, compiler: str | None, requests: list[Request] = REQUESTS
) -> None:
    """Requests that come one after another, the first in chunks, are served exactly."""
    recorder = Recorder(model, num_slots=3, chunk_size=3, compiler=compiler)
    with torch.compiler.set_stance("force_eager"):  # the function of a graph, as it is
        for request in requests:
            recorder.submit(request)
            recorder.step()
        served = recorder.finish()
    graphs = [link.static for link in recorder.engine.runner.links]
    assert all((graph is None) == (compiler is None) for graph in graphs)
    assert all(graph is None or graph.has_tokens for graph in graphs), "ran without the graph"
    for request, own in zip(requests, served, strict=True):
        assert own.finish_reason == "length"
        assert_exact(model, request, own)


@pytest.mark.parametrize("name", SERVED)
def test_a_model_is_served_with_and_without_a_graph(name: str) -> None:
    model = small_model(SERVED[name])
    for compiler in (None, "eager"):
        assert_served(model, compiler)


@pytest.mark.parametrize("name", NOT_A_GRAPH)
def test_a_model_that_routes_nothing_is_served_without_a_graph(name: str) -> None:
    model = small_model(NOT_A_GRAPH[name])
    assert_served(model, None)
    with pytest.raises(ValueError, match="routes tokens, and this model has none"):
        DepthBatchingEngine(model, CacheSettings(1 << 20), compiler="eager")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_is_computed(name: str) -> None:
    config, reason = REFUSED[name]
    for compiler in (None, "eager"):
        with pytest.raises(ValueError, match=reason):
            DepthBatchingEngine(small_model(config), CacheSettings(1 << 20), compiler=compiler)


@pytest.mark.parametrize("name", CRITERIA)
def test_early_exit_by_every_criterion(name: str) -> None:
    model = small_model(small_config(num_recursions=3))
    with_early_exit(model, CRITERIA[name][1])
    for compiler in (None, "eager"):
        assert_served(model, compiler)


@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.full)])
def test_random_settings_are_served_or_refused(examples: int) -> None:
    """In double precision, because some settings make rounding errors large."""
    outcomes: Counter[str] = Counter()

    @given(decoders(wrong=0.0))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    def try_one(values: dict[str, Any]) -> None:
        try:
            model = small_model(from_mapping(DecoderConfig, values)).double()
        except ValueError:
            reject()
        size = model.config.vocab_size
        requests = [replace(own, ids=tuple(i % size for i in own.ids)) for own in REQUESTS]
        for compiler in (None, "eager"):
            try:
                DepthBatchingEngine(model, CacheSettings(1 << 20), compiler=compiler)
            except ValueError as error:
                if not re.search(r"drop tokens|route by themselves|has none", str(error)):
                    raise
                outcomes["refused"] += 1
            else:
                assert_served(model, compiler, requests)
                outcomes["served"] += 1

    try_one()
    assert outcomes["served"] >= examples
    assert outcomes["refused"] > 0 or examples < 100


def test_every_setting_has_a_case() -> None:
    """Each takes another value than its default. A new setting fails this until it has a case."""
    found = values_by_setting(all_configs())
    missing = [
        f"{kind.__name__}.{name}"
        for kind, settings in found.items()
        for name, values in settings.items()
        if len(values) < 2
    ]
    missing += [kind.__name__ for kind in {*OURS.values(), *ROPE_SCALINGS.values()} - set(found)]
    assert not missing, f"give these settings a case: {', '.join(missing)}"
    ours = {
        kind for kind in Criterion.__subclasses__() if kind.__module__.startswith("mor_layers.")
    }
    assert {type(criteria[1]) for criteria in CRITERIA.values()} == ours
