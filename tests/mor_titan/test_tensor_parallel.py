"""Tensor parallelism: a divided model computes the loss, logits and gradients of the whole one."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.layers import NormModulation, Relaxation
from mor_layers.models import LatentAttentionConfig, YarnScaling
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss, StateAdapter
from mor_layers.routers import (
    AdaptiveHalting,
    DepthAndWidth,
    ExitGate,
    FixedDepth,
    RandomDepth,
    RandomLoops,
)
from mor_titan.tensor_parallel import require_divisible
from tests.distributed.pool import WorkerPool
from tests.mor_titan.divided import compare

EXPERTS = MoEConfig(4, 2, ffn_hidden_size=6)
LATENT = LatentAttentionConfig(6, 4, 2, 4, q_lora_rank=5)


def decoder(
    steps: int = 3, router: RouterConfig | None = None, layers: int = 5, **settings: Any
) -> DecoderConfig:
    """A small decoder; settings are those of the recursion or of the decoder."""
    ours = {field.name for field in fields(RecursionConfig)}
    recursion = RecursionConfig(
        steps,
        router=router or ExpertChoice(),
        **{name: value for name, value in settings.items() if name in ours},
    )
    rest = {name: value for name, value in settings.items() if name not in ours}
    return DecoderConfig(32, 16, 12, layers, 4, recursion=recursion, **rest)


CASES = {
    "a plain decoder, an odd vocabulary": DecoderConfig(31, 16, 12, 3, 4),
    "other widths": DecoderConfig(32, 20, 6, 3, 2, rms_norm_epsilon=1e-3, rope_base=50.0),
    "recursive sharing, grouped-query heads": decoder(
        kv_policy="recursive_sharing", num_kv_heads=2, head_dim=6
    ),
    "sharing with update, biases": decoder(
        router=TokenChoice(), kv_policy="sharing_with_update", qkv_bias=True
    ),
    "exit state, norms of heads": decoder(
        router=TokenChoice(), kv_policy="exit_state", qk_norm=True
    ),
    "own attention, norms of heads": decoder(
        own_per_step=("attention",), qk_norm=True, qkv_bias=True
    ),
    "own MLP, norms of steps, tied embeddings": decoder(
        own_per_step=("mlp",), share_norms=False, tie_embeddings=True
    ),
    "lora": decoder(relaxation=Relaxation(3), qkv_bias=True),
    "dora": decoder(relaxation=Relaxation(3, kind="dora", scale=0.5)),
    "experts, routers per step, dense ends": decoder(
        moe=EXPERTS, expert_routers="per_step", dense_ends=True
    ),
    "full experts, router over depth and width": decoder(
        router=DepthAndWidth(mean_experts=1.5),
        moe=MoEConfig(4, 2, bias_update_rate=0.1, capacity_factor=0.8),
    ),
    "latent attention, scaled rotation": decoder(
        latent_attention=LATENT, rope_scaling=YarnScaling(4.0, 8, mscale_all_dim=0.7)
    ),
    "latent attention and experts": decoder(
        latent_attention=LatentAttentionConfig(6, 4, 2, 4),
        moe=EXPERTS,
        kv_policy="recursive_sharing",
    ),
    "all inputs of steps": decoder(
        step_embeddings=True,
        input_injection=True,
        loop_norm=True,
        sandwich_norms=True,
        residual_scale=0.5,
        prelude_layers=0,
        coda_layers=2,
    ),
    "modulation and a loss after every loop": decoder(
        router=FixedDepth(), norm_modulation=NormModulation(4), loop_loss=LoopLoss()
    ),
    "streams": decoder(hyper_connections=HyperConnections(2)),
    "history": decoder(history=HistoryInjection(1)),
    "layers that route by themselves": decoder(
        1,
        router=ExpertChoice(capacity_factors=(0.5,)),
        sharing="middle_sequence",
        anchor_every=2,
        depth_balance=0.1,
    ),
    "several recursions": DecoderConfig(
        32,
        16,
        12,
        num_unrolled_layers=3 + 4,
        num_heads=4,
        recursion=(
            RecursionConfig(3, "cycle", ExpertChoice(), block_layers=1),
            RecursionConfig(2, router=TokenChoice(), kv_policy="exit_state", block_layers=1),
        ),
        moe=EXPERTS,
    ),
    "Huginn's adapter, norms and scale": decoder(
        router=FixedDepth(),
        adapter=StateAdapter(initial_std=0.1),
        exit_norm=True,
        sum_norms=True,
        embedding_scale=3.0,
    ),
    "DeepSeek's experts": decoder(
        moe=MoEConfig(
            4,
            2,
            ffn_hidden_size=6,
            scores="sigmoid",
            num_groups=2,
            gate_scale=2.0,
            shared_ffn_hidden_size=5,
        )
    ),
    "adaptive halting": decoder(router=AdaptiveHalting(), sharing="cycle", layers=3),
    "exit gate": decoder(router=ExitGate(), loop_loss=LoopLoss()),
    "random depths": decoder(router=RandomDepth()),
    "truncated gradients": decoder(router=RandomLoops(backward_steps=1), input_injection=True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_divided_model_computes_what_the_whole_one_does(pool: WorkerPool, case: str) -> None:
    first, second = pool.run(compare, 2, config=CASES[case])
    assert first.keys() == second.keys() and "norm.weights.0" in first
    for name, gradient in first.items():
        # Otherwise the copies of a parameter would drift apart.
        assert torch.equal(gradient, second[name]), name


def test_layers_are_recomputed_in_the_backward_pass(pool: WorkerPool) -> None:
    config = CASES["experts, routers per step, dense ends"]
    pool.run(compare, 2, config=config, recompute=True)


def test_every_setting_of_a_decoder_has_a_case() -> None:
    recursions = [recursion for case in CASES.values() for recursion in case.recursions]
    for cases in (list(CASES.values()), recursions):
        for field in fields(cases[0]):
            if field.name == "multi_token_prediction":  # refused, see test_training.py
                continue
            values = [getattr(case, field.name) for case in cases]
            assert any(value != values[0] for value in values), field.name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_kv_heads": 1}, "of num_heads=4, num_kv_heads=1, ffn_hidden_size=12. Use one of 1,"),
        ({"moe": MoEConfig(4, 2, 9)}, "num_heads=4, num_kv_heads=4, the width of an expert=9"),
        ({"moe": EXPERTS, "dense_ends": True}, "=12, the width of an expert=6. Use one of 1, 2,"),
        ({"latent_attention": LATENT}, "num_heads=4, ffn_hidden_size=12. Use one of 1, 2, 4,"),
    ],
)
def test_a_degree_that_divides_no_heads_or_widths_is_refused(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_degree=8 does not") as refusal:
        require_divisible(decoder(**settings), 8)
    assert reason in str(refusal.value)
