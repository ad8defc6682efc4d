"""torch.compile of a model with fixed capacities: one graph, and none again while training goes on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.recursion import KV_POLICIES
from tests.mor_layers.models.test_latent_attention import SIZES
from tests.mor_layers.small_models import random_ids, small_config, small_model

WARM_UP, STEPS = 2, 20
SETTLED = WARM_UP + 1
"""Steps until nothing is new: the first one after the warm-up finds that it is over."""
ROUTERS: dict[str, RouterConfig] = {
    "expert choice": ExpertChoice(warmup_steps=WARM_UP),
    "auxiliary router": ExpertChoice(predictor="aux_router"),
    "fixed depth": FixedDepth(),
}


class Compilations:
    """A backend of torch.compile that counts the graphs it is given.

    Args:
        backend: compiles the graphs. "aot_eager" traces forward and backward and generates no code.
    """

    def __init__(self, backend: str) -> None:
        self.count, self._compile = 0, lookup_backend(backend)

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.count += 1
        return self._compile(graph, inputs)


def config_of(router: str, policy: str, kind: str) -> DecoderConfig:
    config = small_config(ROUTERS[router], 2, "cycle", policy)  # type: ignore[arg-type]
    if kind == "latent attention":
        return replace(config, num_kv_heads=None, latent_attention=SIZES)
    return replace(config, moe=MoEConfig(4)) if kind == "experts" else config


def train(config: DecoderConfig, backend: str | None) -> tuple[list[int], list[float]]:
    """The number of graphs compiled until after each step, and the loss of each step.

    Args:
        backend: None: nothing is compiled.
    """
    torch._dynamo.reset()
    model, compilations = small_model(config).train(), Compilations(backend or "eager")
    # A graph break is an error with `fullgraph`.
    run = torch.compile(model, fullgraph=True, backend=compilations) if backend else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    counts, losses = [], []
    for step in range(SETTLED + STEPS):
        ids = random_ids(2, 12, seed=step)
        output = run(ids, labels=ids.roll(-1, 1))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.advance([output])
        counts.append(compilations.count)
        losses.append(output.loss.item())
    return counts, losses


CASES = [
    (router, policy, kind, "aot_eager")
    for router in ROUTERS
    for policy in KV_POLICIES
    for kind in ("dense", "latent attention", "experts")
]


@pytest.mark.full  # every day, `tests/distributed/training/test_compiling.py` compiles a recursion
@pytest.mark.parametrize(("router", "policy", "kind", "backend"), CASES)
def test_training_compiles_one_graph_for_each_set_of_capacities(
    router: str, policy: str, kind: str, backend: str
) -> None:
    config = config_of(router, policy, kind)
    counts, losses = train(config, backend)
    assert counts[0] == 1
    assert counts[SETTLED] <= (1 + SETTLED if router == "expert choice" else 1)
    assert counts[SETTLED:] == [counts[SETTLED]] * STEPS
    torch.testing.assert_close(losses, train(config, None)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("router", [TokenChoice(), DepthAndWidth()])
def test_ragged_selections_are_no_single_graph(router: RouterConfig) -> None:
    torch._dynamo.reset()
    model, ids = small_model(small_config(router, 2)), random_ids(2, 12)
    with pytest.raises(Exception, match="data-dependent"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids)
