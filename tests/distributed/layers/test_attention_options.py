"""Windows, sinks, gates and layers without RoPE: N ranks compute what one rank computes.

That one rank computes what Megatron's unrolled layers compute is in `tests/distributed/fields`.
"""

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import flex_attention

from mor_layers import RecursionConfig
from mor_layers.recursion import Exited, KVPolicy, block_masks
from mor_layers.recursion.kv_policies import begin_step
from mor_layers.selection import Tokens
from mor_megatron.layers.attention.step import visible_in
from tests.distributed.layers.test_context_parallel import (
    POLICIES,
    Outcome,
    assert_alike,
    loss_and_gradients,
)
from tests.distributed.layers.test_latent_attention import (
    FULL_RECOMPUTE,
    ROUTERS,
    SP,
    generated,
)
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_size": (5, 0), "window_attn_skip_freq": 2},
    "sinks": {"softmax_type": "learnable"},
    "gate": {"attention_output_gate": True, "qk_layernorm": True},
    "all": {
        "window_size": (6, 0),
        "softmax_type": "off-by-one",
        "attention_output_gate": True,
        "no_rope_freq": 2,
        "rotary_interleaved": True,
    },
}
# name: ranks, layout, config
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp": (2, {"tp": 2}, {}),
    "tp+sp": (2, {"tp": 2}, SP),
    "tp=4": (4, {"tp": 4}, {}),  # more ranks than query groups
    "cp": (2, {"cp": 2}, {}),
    "pp": (2, {"pp": 2}, {}),
    "recomputed": (1, {}, FULL_RECOMPUTE),
}
CASES = [(o, r, p, l) for o in OPTIONS for r in ROUTERS for p in POLICIES for l in LAYOUTS]  # noqa: E741
DAILY = [
    ("window", "token", "exit_state", "cp"),
    ("sinks", "expert", "recursive_sharing", "tp+sp"),
    ("gate", "token", "recursive_sharing", "tp"),
    ("all", "depth and width", "sharing_with_update", "tp+sp"),
]


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[Any, Outcome] = {}

    def compute(recursion: RecursionConfig, option: str) -> Outcome:
        if (recursion, option) not in known:
            known[recursion, option] = pool.run(
                loss_and_gradients, 1, layout={}, recursion=recursion, config=OPTIONS[option]
            )[0]
        return known[recursion, option]

    return compute


@pytest.mark.parametrize(("option", "router", "policy", "layout"), sweep(CASES, DAILY))
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, option: str, router: str, policy: KVPolicy, layout: str
) -> None:
    world_size, parallel, extra = LAYOUTS[layout]
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy)
    outcomes = pool.run(
        loss_and_gradients,
        world_size,
        layout=parallel,
        recursion=recursion,
        config=OPTIONS[option] | extra,
    )
    assert_alike(outcomes, one_rank(recursion, option))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_counts_positions_of_the_sequence(policy: KVPolicy) -> None:
    window, length, chosen = 3, 9, [0, 2, 3, 7]
    everything = Tokens.whole_sequence(length, 1, torch.device("cpu"))
    first = begin_step(policy, 0, everything, None)
    rest = [position for position in range(length) if position not in chosen]
    exited = None
    if policy == "exit_state":
        exited = Exited(Tokens(torch.tensor(rest)[:, None], length), torch.zeros(len(rest), 1, 1))
    second = begin_step(policy, 1, Tokens(torch.tensor(chosen)[:, None], length), first, exited)
    keys = {
        "recursion_wise": chosen,
        "exit_state": chosen + rest,
    }.get(policy, list(range(length)))
    for context, queries, seen in ((first, range(length), range(length)), (second, chosen, keys)):
        mask = visible_in(window, context)
        assert mask is not None
        expected = [[query - window <= key <= query for key in seen] for query in queries]
        assert mask[0, 0].tolist() == expected
        assert visible_in(None, context) is context.causal_mask


def by_blocks(recursion: RecursionConfig, config: dict[str, Any]) -> tuple[Outcome, int]:
    """An outcome with FlexAttention wherever there is a mask, also backward, and how often it ran."""
    count = 0
    plain = flex_attention.flex_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    with (
        warnings.catch_warnings(),
        patch.object(block_masks, "runs_flex_attention", lambda device: True),
        patch.object(block_masks, "_BLOCK", 4),
        patch.object(block_masks, "_SMALLEST_HEAD", 1),
        # PyTorch has the definition of the backward pass on CPUs, but refuses it.
        patch.object(flex_attention, "_validate_device", lambda *tensors: None),
        patch.object(flex_attention, "flex_attention", counted),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        outcome = loss_and_gradients({}, recursion, config)
    return outcome, count


@pytest.mark.parametrize(
    ("option", "policy", "count"),
    [
        # Of each of 4 microbatches: one layer with a window in 3 steps of 2, and both in later steps.
        pytest.param("window", "exit_state", 20, marks=pytest.mark.full),
        pytest.param("gate", "exit_state", 16, marks=pytest.mark.full),
        ("window", "recursive_sharing", 20),
        ("sinks", "recursive_sharing", 0),
    ],
)
def test_attention_by_blocks_equals_masked_attention(
    pool: WorkerPool, one_rank, option: str, policy: KVPolicy, count: int
) -> None:
    recursion = RecursionConfig(3, router=ROUTERS["expert"], kv_policy=policy)
    ((outcome, found),) = pool.run(by_blocks, recursion=recursion, config=OPTIONS[option])
    assert found == count
    assert_alike([outcome], one_rank(recursion, option))


@pytest.mark.parametrize(
    ("option", "policy"),
    sweep([(o, p) for o in OPTIONS for p in POLICIES], [("all", "exit_state")]),
)
def test_generation_equals_the_full_forward_pass(
    pool: WorkerPool, option: str, policy: KVPolicy
) -> None:
    for difference, _ in pool.run(generated, 2, policy=policy, tp=2, fields=OPTIONS[option]):
        assert difference < 2e-6
