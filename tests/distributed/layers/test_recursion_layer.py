"""GPTModel with a RecursionLayer: N ranks compute what one rank computes, losses and gradients."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections
from mor_layers.routers import AdaptiveHalting, DampedLoops
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

SEQUENCE_LENGTH = 14  # with three steps: 14, 9 and 4 tokens, of which 9 do not divide by two ranks


@dataclass(frozen=True)
class Outcome:
    """What one layout computes."""

    loss: float
    gradients: dict[str, Tensor]


def loss_and_gradients(
    layout: dict[str, Any],
    recursion: RecursionConfig | tuple[RecursionConfig, ...],
    config: dict[str, Any],
    ddp: dict[str, Any],
) -> Outcome:
    from mor_megatron import recursion_block_spec

    setup.initialize(**layout)
    chunks = setup.tiny_gpt(
        setup.tiny_config(**config),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    wrapped = setup.data_parallel(chunks, **ddp)
    loss = setup.forward_backward(wrapped, setup.random_tokens(4, SEQUENCE_LENGTH), 1)
    return Outcome(loss, setup.gather_gradients(wrapped))


DENSE = {"num_layers": 8}
MOE = DENSE | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}
SP = {"sequence_parallel": True}

EXPERT = RecursionConfig(
    3, router=ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5)
)
TOKEN = RecursionConfig(3, router=TokenChoice(z_loss_coefficient=0.01))
ATTENTION = ("query", "key", "value", "output")
RECURSIONS: dict[str, RecursionConfig | tuple[RecursionConfig, ...]] = {
    "expert": EXPERT,
    "token": TOKEN,
    "random": RecursionConfig(3, router=RandomDepth()),
    "damped": RecursionConfig(3, router=DampedLoops(0.4)),
    "fixed": RecursionConfig(3, router=FixedDepth(), share_norms=False),
    "sequence": RecursionConfig(3, sharing="middle_sequence"),
    "expert, sharing": RecursionConfig(3, router=EXPERT.router, kv_policy="recursive_sharing"),
    "token, sharing": RecursionConfig(3, router=TOKEN.router, kv_policy="recursive_sharing"),
    "expert, update": RecursionConfig(3, router=EXPERT.router, kv_policy="sharing_with_update"),
    "expert, all helps": RecursionConfig(
        3,
        router=ExpertChoice(alpha=0.5, gate_bias=0.5),
        share_norms=False,
        step_embeddings=True,
        input_injection=True,
        sandwich_norms=True,
        loop_norm=True,
    ),
    "expert, long ends": RecursionConfig(3, router=EXPERT.router, prelude_layers=2, coda_layers=3),
    "random loops": RecursionConfig(
        3,
        router=RandomLoops(seed=0),  # two steps before the first call of `advance`
        relaxation=Relaxation(2, projections=("query", "output")),
    ),
    "loops, last two steps": RecursionConfig(
        3,
        router=RandomLoops(draw="largest", backward_steps=2),
        kv_policy="sharing_with_update",
        input_injection=True,
        share_norms=False,
    ),
    "layers that route by themselves": RecursionConfig(
        1,
        "middle_sequence",
        ExpertChoice(capacity_factors=(0.5,), alpha=1.0, combine="residual"),
        anchor_every=2,
    ),
    "layers that balance depth": RecursionConfig(
        1,
        "middle_sequence",
        ExpertChoice(capacity_factors=(0.5,), alpha=1.0, combine="residual"),
        anchor_every=3,
        depth_balance=0.5,
    ),
    "layers that repeat in damped steps": RecursionConfig(3, "middle_sequence", DampedLoops(0.6)),
    "halting": RecursionConfig(3, router=AdaptiveHalting(bias=0.0), kv_policy="exit_state"),
    "expert, deltas": RecursionConfig(
        3, router=EXPERT.router, relaxation=Relaxation(3, "dora", ATTENTION, 0.5)
    ),
    "fixed, deltas": RecursionConfig(3, relaxation=Relaxation(3, scale=0.5)),
    "token, sharing, deltas": RecursionConfig(
        3,
        router=TOKEN.router,
        kv_policy="recursive_sharing",
        relaxation=Relaxation(3, "dora", ("query", "output", "gate", "up", "down")),
    ),
    "token, update, own attention": RecursionConfig(
        3,
        router=TOKEN.router,
        kv_policy="sharing_with_update",
        share_norms=False,
        own_per_step=("attention",),
    ),
    "expert, streams": RecursionConfig(
        3, router=EXPERT.router, hyper_connections=HyperConnections(2), input_injection=True
    ),
    "token, sharing, static streams": RecursionConfig(
        3,
        router=TOKEN.router,
        kv_policy="recursive_sharing",
        hyper_connections=HyperConnections(3, "static"),
    ),
    "token, modulated norms": RecursionConfig(
        3,
        router=TOKEN.router,
        kv_policy="sharing_with_update",
        share_norms=False,
        norm_modulation=NormModulation(3),
    ),
    "expert, history": RecursionConfig(3, router=EXPERT.router, history=HistoryInjection(1)),
    "expert, own MLPs": RecursionConfig(3, router=EXPERT.router, own_per_step=("mlp",)),
    "aux router": RecursionConfig(3, router=ExpertChoice("mlp", "tanh", predictor="aux_router")),
    "several recursions": (
        replace(EXPERT, num_recursions=2, kv_policy="recursive_sharing", block_layers=1),
        replace(TOKEN, sharing="cycle", kv_policy="exit_state", coda_layers=1, block_layers=1),
    ),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp": (2, {"tp": 2}, DENSE, {}, {}),
    "tp+sp": (2, {"tp": 2}, DENSE, SP, {}),
    "pp": (2, {"pp": 2}, DENSE, {}, {}),
    "dp": (2, {}, DENSE, {}, {}),
    "dp overlap": (2, {}, DENSE, {}, {"overlap_grad_reduce": True}),
    "tp+sp moe": (2, {"tp": 2}, MOE, SP, {}),
    "ep": (2, {"ep": 2}, MOE, {}, {}),
    "tp+sp ep etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, MOE, SP, {}),
    "ep allgather": (2, {"ep": 2}, MOE, {"moe_token_dispatcher_type": "allgather"}, {}),
    "full recompute": (
        1,
        {},
        MOE,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        {},
    ),
    "selective recompute": (
        1,
        {},
        MOE,
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
        {},
    ),
}
_RARE = "deltas|helps|loops|ends|own|streams|norms|history|layers|halting|several"
RARER = [name for name in RECURSIONS if re.search(_RARE, name)]
LAYOUTS["full recompute of dense layers"] = (1, {}, DENSE, LAYOUTS["full recompute"][3], {})
# Replicas draw random depths side by side, one rank draws them one after the other.
CASES = [
    (name, layout)
    for name in RECURSIONS
    for layout in list(LAYOUTS)[:-1]
    if name != "random" or not layout.startswith(("dp", "ep"))
    if layout == "tp+sp" or name not in RARER or (layout == "tp" and "deltas" in name)
]
CASES += [
    ("expert, deltas", "tp+sp moe"),
    ("expert, all helps", "pp"),
    ("expert, long ends", "pp"),
    ("expert, long ends", "tp+sp moe"),
    ("expert, all helps", "full recompute"),
    ("expert, all helps", "tp+sp moe"),
    ("token, update, own attention", "tp+sp ep etp1"),
    ("expert, own MLPs", "full recompute of dense layers"),
    ("expert, streams", "full recompute"),
    ("token, modulated norms", "full recompute"),
    ("random loops", "pp"),
    ("random loops", "dp overlap"),
    ("loops, last two steps", "dp overlap"),
    ("layers that route by themselves", "pp"),
    ("layers that route by themselves", "full recompute"),
    ("several recursions", "pp"),
    ("several recursions", "tp+sp moe"),
    ("several recursions", "full recompute"),
    ("layers that balance depth", "full recompute"),
    ("layers that balance depth", "pp"),
    ("layers that repeat in damped steps", "pp"),
    ("layers that balance depth", "dp overlap"),
    ("fixed, deltas", "pp"),
    ("token, sharing, deltas", "dp overlap"),
    ("fixed, deltas", "full recompute of dense layers"),
]

# Every day, a layout runs a router of each kind it can tell apart: one with a fixed number of tokens
# and one without. Every recursion meets a layout that cuts the model and one that does not.
DAILY = {
    "tp": ["random", "aux router"],
    "tp+sp": ["expert", "token, sharing"],
    "pp": ["token", "expert, sharing"],
    "dp": ["fixed", "expert, update"],
    "dp overlap": ["token"],
    "tp+sp moe": ["token", "sequence"],
    "ep": ["expert", "token, sharing"],
    "tp+sp ep etp1": ["expert, update"],
    "ep allgather": ["fixed"],
    "full recompute": ["random", "expert", "token, sharing"],
    "selective recompute": ["sequence", "aux router"],
}
# A rarer recursion meets sequence parallelism, and these layouts where nothing else is rare. Those that
# are `OTHERWISE_COVERED` do so in the exhaustive sweep only: other daily tests have their ingredients.
ONLY_THERE = ("full recompute of dense layers", "tp+sp ep etp1", "pp")
OTHERWISE_COVERED = {
    "expert, deltas",
    "token, sharing, deltas",
    "expert, all helps",
    "expert, long ends",
    "token, update, own attention",
    "token, sharing, static streams",
    "expert, history",
    "loops, last two steps",
    "halting",
}
RARELY = [
    ("token, update, own attention", layout)
    for layout in ("pp", "selective recompute", "full recompute")
]
RARELY += [("token, modulated norms", layout) for layout in ("tp", "pp", "dp overlap", "ep")]
RARELY += [("loops, last two steps", layout) for layout in ("pp", "full recompute", "ep")]
RARELY += [("layers that route by themselves", layout) for layout in ("tp", "dp overlap", "ep")]
RARELY += [("halting", layout) for layout in ("tp", "pp", "full recompute", "dp overlap")]
RARELY += [("expert, history", layout) for layout in ("tp", "pp", "full recompute")]
RARELY += [("expert, streams", layout) for layout in ("tp", "pp", "dp overlap", "tp+sp ep etp1")]
SAMPLED = sweep(
    [*CASES, *RARELY],
    [
        (name, layout)
        for name, layout in CASES
        if name not in OTHERWISE_COVERED
        if (layout == "tp+sp" or layout in ONLY_THERE if name in RARER else name in DAILY[layout])
    ],
)


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[tuple[str, bool], Outcome] = {}

    def compute(name: str, config: dict[str, Any]) -> Outcome:
        key = (name, config is MOE)
        if key not in known:
            known[key] = pool.run(
                loss_and_gradients, 1, layout={}, recursion=RECURSIONS[name], config=config, ddp={}
            )[0]
        return known[key]

    return compute


@pytest.mark.parametrize(("name", "layout"), SAMPLED)
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, name: str, layout: str
) -> None:
    world_size, parallel, config, extra, ddp = LAYOUTS[layout]
    expected = one_rank(name, config)
    for outcome in pool.run(
        loss_and_gradients,
        world_size,
        layout=parallel,
        recursion=RECURSIONS[name],
        config=config | extra,
        ddp=ddp,
    ):
        assert outcome.loss == pytest.approx(expected.loss, abs=1e-6)
        assert outcome.gradients.keys() == expected.gradients.keys()
        for name, gradient in outcome.gradients.items():
            torch.testing.assert_close(
                gradient, expected.gradients[name], rtol=1e-5, atol=1e-6, msg=partial(_named, name)
            )


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"
