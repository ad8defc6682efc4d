"""Muon in every layout: the steps of one rank, and a state that moves between layouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import ExpertChoice, RecursionConfig, Relaxation
from mor_layers.recursion import HyperConnections
from mor_megatron import recursion_block_spec, update_routers
from mor_megatron.checkpoints import runs
from mor_tools.pretraining.optimizer import MUON_SCALE, build_optimizer
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.settings.data import DataSettings
from mor_tools.pretraining.settings.training import TrainingSettings
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

RECURSION = RecursionConfig(
    3,
    router=ExpertChoice(alpha=0.5),
    relaxation=Relaxation(4, projections=("query", "output")),
    hyper_connections=HyperConnections(2),
)
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP+SP × EP": (2, {"tp": 2, "ep": 2, "etp": 1}, {"sequence_parallel": True}),
    "PP": (2, {"pp": 2}, {}),
    "DP": (2, {}, {}),
}
SETTINGS = Settings(
    training=TrainingSettings(optimizer="muon", learning_rate=1e-2, gradient_clip=0.0),
    data=DataSettings(),
)


@dataclass(frozen=True)
class Outcome:
    """What a layout computes in two steps."""

    losses: list[float]
    parameters: dict[str, Tensor]


def build(config: dict[str, Any]) -> tuple[list[Any], Any]:
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=8, **EXPERTS, **config),
        block=lambda c, v: recursion_block_spec(c, RECURSION, vp_stage=v),
    )
    wrapped = setup.data_parallel(chunks)
    return wrapped, build_optimizer(SETTINGS, wrapped)


def train(
    layout: dict[str, Any],
    config: dict[str, Any],
    steps: range,
    load: Path | None = None,
    save: Path | None = None,
) -> Outcome:
    setup.initialize(**layout)
    chunks, optimizer = build(config)
    if load is not None:
        runs.load(load, chunks, optimizer)
    losses = []
    for step in steps:
        tokens = setup.random_tokens(4, 16, seed=step)
        losses.append(setup.train_step(chunks, optimizer, tokens))
        update_routers(chunks)
    if save is not None:
        runs.save(save, steps.stop, chunks, optimizer)
    return Outcome(losses, setup.gather_parameters(chunks))


def parameters_of_muon() -> tuple[set[str], float]:
    """The names of what Muon updates, and the size of its update of a matrix."""
    setup.initialize()
    chunks, optimizer = build({})
    names = {id(parameter): name for name, parameter in chunks[0].module.named_parameters()}
    part = next(p for p in optimizer.chained_optimizers if "Muon" in type(p.optimizer).__name__)
    updated = [p for group in part.optimizer.param_groups for p in group["params"]]
    found = {names[id(parameter)] for parameter in updated}
    matrix = next(
        p for p in updated if names[id(p)].endswith("0.self_attention.linear_proj.weight")
    )
    before = matrix.detach().clone()
    for group in part.optimizer.param_groups:
        group["weight_decay"] = 0.0
    setup.train_step(chunks, optimizer, setup.random_tokens(4, 16))
    return found, (matrix - before).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> Outcome:
    return pool.run(train, layout={}, config={}, steps=range(2))[0]


@pytest.mark.parametrize(
    "name", ["TP+SP × EP", *(pytest.param(name, marks=pytest.mark.full) for name in ("PP", "DP"))]
)
def test_a_layout_takes_the_steps_of_one_rank(pool: WorkerPool, alone: Outcome, name: str) -> None:
    ranks, layout, config = LAYOUTS[name]
    for outcome in pool.run(train, ranks, layout=layout, config=config, steps=range(2)):
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)
        torch.testing.assert_close(outcome.parameters, alone.parameters, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_in_another_layout(pool: WorkerPool, alone: Outcome, tmp_path: Path) -> None:
    ranks, layout, config = LAYOUTS["TP+SP × EP"]
    pool.run(train, ranks, layout=layout, config=config, steps=range(1), save=tmp_path)
    (resumed,) = pool.run(train, layout={}, config={}, steps=range(1, 2), load=tmp_path)
    assert resumed.losses == pytest.approx(alone.losses[1:], rel=1e-5)
    torch.testing.assert_close(resumed.parameters, alone.parameters, rtol=1e-4, atol=1e-5)


def test_matrices_take_muon_and_everything_else_adamw(pool: WorkerPool) -> None:
    ((names, size),) = pool.run(parameters_of_muon)
    assert any("experts.local_experts.0.linear_fc1" in name for name in names)
    assert any("deltas.query" in name for name in names)
    assert any(name.endswith("linear_qkv.weight") for name in names)
    assert not any("embedding" in name or "output_layer" in name for name in names)
    assert not any("norm" in name or "recursion.router" in name for name in names)
    # An orthogonal matrix of 32 x 32 has entries of 1 / sqrt(32), and the scale adds sqrt(32).
    assert size == pytest.approx(SETTINGS.training.learning_rate * MUON_SCALE, rel=0.15)
