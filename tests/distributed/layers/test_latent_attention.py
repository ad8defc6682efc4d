"""Multi-latent attention in a recursion: N ranks compute what one rank computes, under every KV policy.

That one rank computes what Megatron's unrolled layers compute is a row of `tests/distributed/fields`.
"""

from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.recursion import KVPolicy
from mor_megatron import causal_routing, recursion_block_spec
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.trial import MLA
from tests.distributed.layers.test_context_parallel import (
    FULL_RECOMPUTE,
    MOE,
    POLICIES,
    Outcome,
    assert_alike,
    loss_and_gradients,
)
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

EXPERT = ExpertChoice(predictor_coefficient=0.1, capacity_factors=(1.0, 0.58, 0.3), alpha=0.5)
ROUTERS = {
    "expert": EXPERT,
    "token": TokenChoice(z_loss_coefficient=0.01),
    "fixed": FixedDepth(),
    "depth and width": DepthAndWidth(),
}
SP = {"sequence_parallel": True}
RAISED_AGAIN = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "mla_up_proj"],
}
# name: ranks, layout, config
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp": (2, {"tp": 2}, {}),
    "tp+sp": (2, {"tp": 2}, SP),
    "tp+sp, recomputed": (2, {"tp": 2}, SP | RAISED_AGAIN),
    "pp": (2, {"pp": 2}, {}),
    "cp": (2, {"cp": 2}, {}),
    "cp x tp+sp": (4, {"cp": 2, "tp": 2}, SP),
    "tp+sp, experts": (2, {"tp": 2}, MOE | SP),
    "recomputed": (1, {}, FULL_RECOMPUTE),
    "raised again": (1, {}, RAISED_AGAIN),
}
CASES = [(r, p, layout) for r in ROUTERS for p in POLICIES for layout in LAYOUTS]
DAILY = [
    ("depth and width", "exit_state", "tp+sp, recomputed"),
    ("token", "sharing_with_update", "cp"),
    ("expert", "recursion_wise", "pp"),
]


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[Any, Outcome] = {}

    def compute(recursion: RecursionConfig, extra: dict[str, Any]) -> Outcome:
        experts = MOE if "num_moe_experts" in extra else {}
        key = recursion, bool(experts)
        if key not in known:
            known[key] = pool.run(
                loss_and_gradients, 1, layout={}, recursion=recursion, config=MLA | experts
            )[0]
        return known[key]

    return compute


@pytest.mark.parametrize(("router", "policy", "layout"), sweep(CASES, DAILY))
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, router: str, policy: KVPolicy, layout: str
) -> None:
    world_size, parallel, extra = LAYOUTS[layout]
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy)
    outcomes = pool.run(
        loss_and_gradients, world_size, layout=parallel, recursion=recursion, config=MLA | extra
    )
    assert_alike(outcomes, one_rank(recursion, extra))


@pytest.mark.parametrize("layout", ["tp+sp", pytest.param("tp", marks=pytest.mark.full)])
def test_deltas_of_the_output_projection(pool: WorkerPool, one_rank, layout: str) -> None:
    recursion = RecursionConfig(
        3, router=EXPERT, relaxation=Relaxation(2, "dora", ("output", "down"))
    )
    world_size, parallel, extra = LAYOUTS[layout]
    outcomes = pool.run(
        loss_and_gradients, world_size, layout=parallel, recursion=recursion, config=MLA | extra
    )
    assert_alike(outcomes, one_rank(recursion, {}))


def refuse(fields: dict[str, Any], recursion: RecursionConfig, reason: str) -> None:
    setup.initialize()
    config = setup.tiny_config(num_layers=8, **MLA | {"rope_type": "yarn"})
    for name, value in fields.items():  # afterwards: Megatron asks for kernels that are not here
        setattr(config, name, value)
    with pytest.raises(ValueError, match=reason):
        setup.tiny_gpt(config, lambda c, vp_stage: recursion_block_spec(c, recursion))


@pytest.mark.parametrize(
    ("fields", "relaxation", "reason"),
    [
        ({"apply_rope_fusion": True}, None, "takes the row number as the position"),
        ({"cache_mla_latents": True}, None, "caches a recursion's latent rows anyway"),
        ({}, Relaxation(2, projections=("query",)), "projected in two stages"),
    ],
)
def test_what_latent_attention_does_not_combine_with_is_refused(
    pool: WorkerPool, fields: dict[str, Any], relaxation: Relaxation | None, reason: str
) -> None:
    recursion = RecursionConfig(3, relaxation=relaxation)
    pool.run(refuse, 1, fields=fields, recursion=recursion, reason=reason)


LENGTH, PROMPT, BATCH = 14, 8, 2


def generated(
    policy: KVPolicy, tp: int, fields: dict[str, Any]
) -> tuple[float, set[tuple[int, ...]]]:
    """Largest difference of a logit from the full forward pass, and the shapes of cached rows."""
    setup.initialize(tp=tp)
    recursion = RecursionConfig(3, router=DepthAndWidth(), kv_policy=policy)
    (model,) = setup.tiny_gpt(
        # Megatron's own latent attention caches keys of as many heads as there are groups.
        setup.tiny_config(num_layers=8, num_query_groups=4, **fields),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    model.eval()
    memory = StaticInferenceContext(BATCH, LENGTH)
    ids = setup.random_tokens(BATCH, LENGTH)[:, :LENGTH]
    positions = torch.arange(LENGTH).expand_as(ids)
    logits = []
    with torch.no_grad():
        with causal_routing(model):
            expected = model(ids, positions, None)
        for begin, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]:
            now = slice(begin, end)
            logits.append(model(ids[:, now], positions[:, now], None, inference_context=memory))
            memory.sequence_len_offset = end
    stored = memory.key_value_memory_dict.items()
    shapes = {
        tuple(rows.shape[2:]) for name, pair in stored if isinstance(name, int) for rows in pair
    }
    return (torch.cat(logits, dim=1) - expected).abs().max().item(), shapes


@pytest.mark.parametrize(
    ("policy", "tp"),
    sweep(
        [(p, tp) for p in POLICIES for tp in (1, 2)], [("exit_state", 2), ("recursive_sharing", 1)]
    ),
)
def test_generation_caches_latent_rows(pool: WorkerPool, policy: KVPolicy, tp: int) -> None:
    for difference, shapes in pool.run(generated, tp, policy=policy, tp=tp, fields=MLA):
        assert difference < 2e-6
        assert {(1, MLA["kv_lora_rank"]), (1, MLA["qk_pos_emb_head_dim"])} == {
            shape for shape in shapes if shape[0] == 1
        }
