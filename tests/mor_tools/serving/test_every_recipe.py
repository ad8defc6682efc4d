"""Every recipe that we ship: its tiny twin is served exactly, in both kinds of ticks."""

import pytest
import torch

from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_tools.pretraining.models.decoder import decoder_config
from mor_tools.recipes import recipes, tiny_twin
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt
from tests.mor_layers.small_models import small_model

RECIPES = {found.name: found.settings for found in recipes()}
REFUSED = {"mod_360m": "route by themselves"}
"""Recipes that the engine refuses, with a part of the reason."""
REQUESTS = [Request(prompt(length, length), 3) for length in (6, 1)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_served_exactly_or_refused_by_name(name: str) -> None:
    model = small_model(decoder_config(tiny_twin(RECIPES[name]), 32))
    for compiler in (None, "eager"):
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                DepthBatchingEngine(model, CacheSettings(1 << 20), compiler=compiler)
            continue
        with torch.compiler.set_stance("force_eager"):  # the function of a graph, as it is
            recorder = Recorder(model, 1 << 22, num_slots=2, chunk_size=4, compiler=compiler)
            for request in REQUESTS:
                recorder.submit(request)
            served = recorder.finish()
        for request, own in zip(REQUESTS, served, strict=True):
            assert_exact(model, request, own)
