"""A training step does not wait for the device, except where the docs say so (`docs/pages/gpus.md`)."""

from typing import Any

import pytest
import torch

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
)
from mor_megatron import recursion_block_spec, update_routers
from tests.distributed import megatron_setup as setup
from tests.distributed.layers.host_waits import host_waits
from tests.distributed.pool import WorkerPool


def waits_of_a_step(
    recursion: RecursionConfig, experts: int | None, masked: bool
) -> dict[str, int]:
    """Of the third training step: earlier ones read settings that stay."""
    setup.initialize()
    moe: dict[str, Any] = {}
    if experts is not None:
        moe = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}
        moe |= {"moe_token_dispatcher_type": "alltoall", "moe_z_loss_coeff": 0.01}
    config = setup.tiny_config(num_layers=8, **moe)
    (model,) = setup.data_parallel(
        setup.tiny_gpt(config, lambda config, v: recursion_block_spec(config, recursion))
    )
    tokens = setup.random_tokens(3, 14)
    positions, mask = torch.arange(14).expand(3, -1), None
    if masked:
        mask = torch.ones(3, 1, 14, 14, dtype=torch.bool).triu(1)
        mask[:, :, 5:, :5] = True
    found: dict[str, int] = {}
    for _ in range(3):
        model.zero_grad_buffer()
        with host_waits() as waits:
            loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            loss.backward()
            update_routers(model)
        found = dict(waits)
        mask = None if mask is None else mask.clone()
    return found


WIDTH = "decision.py:keep_where"
"""How wide the widest sequence of a ragged selection is: once a step that selects."""


@pytest.mark.parametrize(
    ("recursion", "experts", "masked", "expected"),
    [
        (RecursionConfig(3, router=ExpertChoice()), 4, False, {}),
        (
            RecursionConfig(3, router=ExpertChoice(), kv_policy="sharing_with_update"),
            None,
            False,
            {},
        ),
        (RecursionConfig(3, router=ExpertChoice(), kv_policy="exit_state"), None, False, {}),
        (RecursionConfig(3, router=FixedDepth()), None, False, {}),
        (RecursionConfig(3, router=RandomDepth()), None, False, {}),
        (RecursionConfig(3, router=TokenChoice()), 4, False, {WIDTH: 2}),
        (RecursionConfig(3, router=TokenChoice(balancing="loss_free")), None, False, {WIDTH: 2}),
        (
            RecursionConfig(3, router=DepthAndWidth(mean_experts=1.5)),
            4,
            False,
            {WIDTH: 2, "depth_and_width.py:adjust": 1, "router.py:advance": 2},
        ),
        (
            RecursionConfig(3, router=ExpertChoice(warmup_steps=5)),
            None,
            False,
            {"expert_choice.py:capacity_factor": 1},
        ),
        (RecursionConfig(3, router=ExpertChoice(warmup_steps=1)), None, False, {}),
        (
            RecursionConfig(3, router=ExpertChoice()),
            None,
            True,
            {"documents.py:_read": 1, WIDTH: 2},
        ),
    ],
)
def test_the_host_waits_only_where_it_must(
    pool: WorkerPool, recursion: Any, experts: int | None, masked: bool, expected: dict[str, int]
) -> None:
    (found,) = pool.run(waits_of_a_step, recursion=recursion, experts=experts, masked=masked)
    assert found == expected
