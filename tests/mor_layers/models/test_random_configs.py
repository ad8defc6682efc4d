"""Any settings at all: refused by name, with what is allowed, or they train a step."""

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mor_layers import (
    DecoderConfig,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    from_mapping,
    to_mapping,
)
from mor_layers.layers import NormModulation
from mor_layers.models import ROPE_SCALINGS, LatentAttentionConfig, MultiTokenPrediction
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss
from tests.mor_layers.random_configs import OURS, decoders

INSTRUCTION = re.compile(
    r"\b(must|use|leave (it|them) out|set|give|expected|allowed|needs|at least|raise)\b",
    re.IGNORECASE,
)
NAMES = {
    field.name
    for kind in (
        DecoderConfig,
        RecursionConfig,
        MoEConfig,
        Relaxation,
        LoopLoss,
        HyperConnections,
        LatentAttentionConfig,
        MultiTokenPrediction,
        *ROPE_SCALINGS.values(),
        *OURS.values(),
    )
    for field in dataclasses.fields(kind)
} | {"type"}


NESTED = {
    "relaxation": Relaxation,
    "loop_loss": LoopLoss,
    "hyper_connections": HyperConnections,
    "norm_modulation": NormModulation,
    "history": HistoryInjection,
}


def built(values: Any) -> DecoderConfig:
    """The dataclasses from nested mappings, by their constructors, which YAML does not use so."""
    recursion, moe = values["recursion"], values.get("moe")
    latent = values.get("latent_attention")
    if isinstance(latent, dict) and latent:
        latent = LatentAttentionConfig(**latent)
    if isinstance(recursion, dict) and "num_recursions" in recursion:
        recursion = dict(recursion)
        recursion["router"] = built_router(recursion["router"])
        for name, kind in NESTED.items():
            if isinstance(recursion.get(name), dict):
                recursion[name] = kind(**recursion[name])
        recursion = RecursionConfig(**recursion)
    if isinstance(moe, dict) and moe:
        moe = MoEConfig(**moe)
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling:
        options = {name: value for name, value in scaling.items() if name != "rope_type"}
        scaling = ROPE_SCALINGS[scaling["rope_type"]](**options)
    heads = values.get("multi_token_prediction")
    if isinstance(heads, dict) and heads:
        heads = MultiTokenPrediction(**heads)
    nested = {"recursion": recursion, "moe": moe, "latent_attention": latent}
    nested |= {"rope_scaling": scaling, "multi_token_prediction": heads}
    return DecoderConfig(**(values | nested))


def built_router(router: Any) -> Any:
    if not (isinstance(router, dict) and "type" in router):
        return router
    options = {name: value for name, value in router.items() if name != "type"}
    if "router" in options:
        options["router"] = built_router(options["router"])
    return OURS[router["type"]](**options)


def flaws(message: str) -> str:
    """What a refusal should say and does not; nothing where it is good."""
    if not set(re.findall(r"\w+", message)) & NAMES:
        return "names no setting"
    if not re.search(r"=|: |got", message):
        return "does not say what was given"
    return "" if INSTRUCTION.search(message) else "does not say what to do"


def train(config: DecoderConfig) -> None:
    """A step of training and a look at the result as generation routes."""
    model = MoRTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(config.vocab_size, (2, 7))
    documents = (torch.arange(7) > 3).long().expand(2, 7)
    is_padding = torch.arange(7).expand(2, 7) > torch.tensor([[6], [4]])
    for masks in ({}, {"documents": documents, "is_padding": is_padding}):
        output = model(ids, labels=ids.roll(-1, dims=1), **masks)
        output.loss.backward()
        assert output.loss.isfinite()
        optimizer.step()
        optimizer.zero_grad()
        model.advance([output])
    model.eval()
    with torch.no_grad():
        assert model(ids, causal_routing=True).logits.isfinite().all()
        assert model(ids[:1, :1], causal_routing=True).logits.isfinite().all()


def check(values: dict[str, Any], make: Any) -> str:
    try:
        config = make(values)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert not flaws(message), f"{flaws(message)}: {message}"
        return "refused"
    assert from_mapping(DecoderConfig, to_mapping(config)) == config
    train(config)
    return "trained"


def as_constructors_take_it(values: dict[str, Any]) -> DecoderConfig:
    return built(values)


def as_yaml_has_it(values: dict[str, Any]) -> DecoderConfig:
    return from_mapping(DecoderConfig, values)


@pytest.mark.parametrize("make", [as_constructors_take_it, as_yaml_has_it])
@pytest.mark.parametrize("examples", [40, pytest.param(500, marks=pytest.mark.full)])
def test_random_settings_are_refused_by_name_or_train(make, examples):
    torch.manual_seed(0)
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(decoders())
    def look(values: dict[str, Any]) -> None:
        outcomes[check(values, make)] += 1

    look()
    # Neighbouring examples are variants of one another, so shares vary widely with the code drawn from.
    assert min(outcomes["refused"], outcomes["trained"]) > examples / 100, outcomes
