"""Megatron-FSDP shards a recursion, whose layers run several times between two optimizer steps."""

from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from mor_megatron import recursion_block_spec, update_routers
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

RECURSIONS = {
    "expert": RecursionConfig(3, router=ExpertChoice(alpha=0.5, warmup_steps=3)),
    "token, shared keys": RecursionConfig(
        3, router=TokenChoice(), kv_policy="recursive_sharing", sharing="cycle"
    ),
}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 0.01,
}


def losses(recursion: RecursionConfig, sharded: str | None, **settings: Any) -> list[float]:
    """Of some steps of training on ranks that are data-parallel.

    Args:
        sharded: what Megatron-FSDP spreads over ranks; None: Megatron's own data parallelism.
    """
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    from tests.distributed.platform import fsdp_on_cpu

    setup.initialize()
    config = setup.tiny_config(num_layers=9 if recursion.sharing == "cycle" else 8, **settings)
    chunks = setup.tiny_gpt(config, lambda c, v: recursion_block_spec(c, recursion, vp_stage=v))
    if sharded is None:
        wrapped: list[Any] = list(setup.data_parallel(chunks))
    else:
        fsdp_on_cpu.enable()
        options = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            use_megatron_fsdp=True,
            data_parallel_sharding_strategy=sharded,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        wrapped = [FullyShardedDataParallel(config, options, chunks[0])]
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = wrapped[0].no_sync
    optimizer = setup.build_optimizer(wrapped, adam_eps=1e-2)
    found = []
    for seed in range(4):
        found.append(setup.train_step(wrapped, optimizer, setup.random_tokens(4, 16, seed)))
        update_routers(wrapped)
    return found


@pytest.mark.parametrize(
    ("name", "sharded", "settings"),
    [
        ("expert", "optim_grads_params", {}),
        pytest.param("expert", "optim_grads", {}, marks=pytest.mark.full),
        pytest.param("token, shared keys", "optim_grads_params", {}, marks=pytest.mark.full),
        pytest.param("expert", "optim_grads_params", MOE, marks=pytest.mark.full),
        pytest.param(
            "expert",
            "optim_grads_params",
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            marks=pytest.mark.full,
        ),
        pytest.param(
            "expert",
            "optim_grads_params",
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_sharded_recursion_trains_as_one_that_is_not(
    pool: WorkerPool, name: str, sharded: str, settings: dict[str, Any]
) -> None:
    expected = pool.run(losses, 2, recursion=RECURSIONS[name], sharded=None, **settings)[0]
    found = pool.run(losses, 2, recursion=RECURSIONS[name], sharded=sharded, **settings)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4  # steps change the loss
