"""Models that together set every setting of a decoder, for what must hold of all of them."""

import dataclasses
from collections import defaultdict
from dataclasses import replace
from typing import Any

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RandomDepth,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.layers import NormModulation
from mor_layers.models import ROPE_SCALINGS, LatentAttentionConfig, MultiTokenPrediction
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss, StateAdapter
from mor_layers.routers import AdaptiveHalting, DampedLoops, Deepened, ExitGate, RandomLoops
from tests.mor_layers.small_models import plain_config, small_config

BASE = small_config(TokenChoice(), 3, block_size=2)
assert isinstance(BASE.recursion, RecursionConfig)
EXPERTS = MoEConfig(4, 2)
TRAINED_OTHERWISE = MoEConfig(3, 1, 5, 0.1, 0.0, 0.2, capacity_factor=None)


def changed(base: DecoderConfig = BASE, **changes: Any) -> DecoderConfig:
    """A model whose recursion is another one."""
    assert isinstance(base.recursion, RecursionConfig)
    return replace(base, recursion=replace(base.recursion, **changes))


def looped(moe: MoEConfig | None = None, **changes: Any) -> DecoderConfig:
    """The same with two steps and expert choice."""
    recursion = RecursionConfig(**{"num_recursions": 2, "router": ExpertChoice()} | changes)
    return replace(BASE, num_unrolled_layers=6, recursion=recursion, moe=moe)


SERVED: dict[str, DecoderConfig] = {
    "token choice": BASE,
    "biases, norms of queries and keys": replace(
        BASE,
        qkv_bias=True,
        qk_norm=True,
        rms_norm_epsilon=1e-3,
        rope_base=100.0,
        tie_embeddings=True,
    ),
    "other sizes": replace(
        BASE,
        vocab_size=19,
        hidden_size=8,
        ffn_hidden_size=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
    ),
    "scales and sums": replace(looped(residual_scale=0.7), embedding_scale=2.0, sum_norms=True),
    "linear positions": replace(BASE, rope_scaling=ROPE_SCALINGS["linear"](2.0)),
    "llama3 positions": replace(BASE, rope_scaling=ROPE_SCALINGS["llama3"](4.0, 16, 0.5, 2.0)),
    "yarn positions": replace(
        BASE, rope_scaling=ROPE_SCALINGS["yarn"](4.0, 16, attention_factor=1.3, truncate=False)
    ),
    "latent rows": replace(
        BASE,
        num_kv_heads=None,
        latent_attention=LatentAttentionConfig(8, 4, 2, 6),
        rope_scaling=ROPE_SCALINGS["yarn"](4.0, 16, 16.0, 0.5, 0.7, 0.6),
    ),
    "latent queries": replace(
        looped(), num_kv_heads=None, latent_attention=LatentAttentionConfig(6, 2, 4, 4, 5)
    ),
    "experts of sums": looped(
        replace(EXPERTS, shared_ffn_hidden_size=6), expert_routers="per_step"
    ),
    "experts of groups": replace(
        BASE,
        moe=MoEConfig(
            4,
            2,
            scores="sigmoid",
            normalizes_gates=False,
            gate_scale=1.5,
            num_groups=2,
            groups_per_token=2,
        ),
        dense_ends=True,
    ),
    "experts trained otherwise": looped(TRAINED_OTHERWISE, router=TokenChoice()),
    "heads for further tokens": replace(BASE, multi_token_prediction=MultiTokenPrediction(2, 0.3)),
    "expert choice of all settings": looped(
        router=ExpertChoice(
            "mlp", "tanh", 0.7, 2.0, (0.8, 0.4), 2, 5, "aux_router", 0.1, 0.4, 0.01, "additive"
        )
    ),
    "expert choice with a bias": looped(
        router=ExpertChoice(gate_bias=1.0), kv_policy="recursive_sharing"
    ),
    "token choice of all settings": looped(
        router=TokenChoice("mlp", "sigmoid", 0.5, 2.0, "loss_free", 0.1, 0.01, "residual"),
        kv_policy="sharing_with_update",
    ),
    "token choice with a bias": looped(
        router=TokenChoice(activation="sigmoid", gate_bias=1.0), kv_policy="exit_state"
    ),
    "depth and width": looped(EXPERTS, router=DepthAndWidth((0.5,), 1.5, "mlp", 0.5)),
    "random depth": looped(router=RandomDepth((0.9, 0.5))),
    "halting": changed(router=AdaptiveHalting(0.1, 0.1, -0.3)),
    "a gate that was trained to exit": changed(
        router=ExitGate(0.6, 1e-4, 0.3), loop_loss=LoopLoss("geometric", 0.5, 0.1)
    ),
    "a deepened router": changed(num_recursions=3, router=Deepened(ExpertChoice(), 1)),
    "damped loops": changed(router=DampedLoops(0.5), loop_norm=True),
    "random loops": changed(
        router=RandomLoops(2, 7, "log_normal_poisson", 2.0, 3, 1), input_injection=True
    ),
    "norms of each step": changed(share_norms=False, step_embeddings=True, sandwich_norms=True),
    "modulated norms": changed(norm_modulation=NormModulation(3)),
    "deltas": changed(relaxation=Relaxation(2)),
    "scaled deltas of some": looped(relaxation=Relaxation(3, "dora", ("query", "gate"), 0.5)),
    "own attention": changed(own_per_step=("attention",)),
    "own attention and MLP": looped(own_per_step=("attention", "mlp")),
    "streams": changed(hyper_connections=HyperConnections(2)),
    "static streams": looped(hyper_connections=HyperConnections(3, "static")),
    "history": changed(router=FixedDepth(), history=HistoryInjection(1)),
    "history without gates": changed(
        small_config(TokenChoice(), 4), history=HistoryInjection(2, step_gate=False)
    ),
    "adapter": changed(adapter=StateAdapter(), exit_norm=True),
    "adapter from noise": looped(adapter=StateAdapter(0.5)),
    "nothing before or after": small_config(ExpertChoice(), 3, "cycle"),
    "layers after": small_config(ExpertChoice(), 3, "cycle", ends=(0, 2)),
    "no recursion": plain_config(3),
    "two recursions": replace(
        plain_config(9),
        recursion=(
            RecursionConfig(2, "cycle", ExpertChoice(), "exit_state", block_layers=2),
            RecursionConfig(3, "middle_cycle", TokenChoice(), block_layers=1),
        ),
    ),
}
"""Models that the engine serves, in ticks with and without a graph."""

NOT_A_GRAPH: dict[str, DecoderConfig] = {
    "layers that repeat one by one": small_config(sharing="middle_sequence", block_size=2),
    "layers of one that repeats": small_config(sharing="sequence", block_size=2),
}
"""Models that route no token, which the engine serves in ticks without a graph only."""

_BY_LAYER = RecursionConfig(1, "sequence", ExpertChoice(capacity_factors=(0.5,)))
REFUSED: dict[str, tuple[DecoderConfig, str]] = {
    "layers that route": (
        replace(BASE, num_unrolled_layers=4, recursion=replace(_BY_LAYER, anchor_every=2)),
        "route by themselves",
    ),
    "layers that route evenly": (
        replace(BASE, num_unrolled_layers=4, recursion=replace(_BY_LAYER, depth_balance=0.1)),
        "route by themselves",
    ),
    "experts that drop": (
        replace(BASE, moe=replace(EXPERTS, capacity_factor=1.0, drop_policy="position")),
        "lets experts drop tokens",
    ),
}
"""Models that the engine refuses, with a part of the reason."""


def all_configs() -> list[DecoderConfig]:
    """Of all models above."""
    return [*SERVED.values(), *NOT_A_GRAPH.values(), *(config for config, _ in REFUSED.values())]


def values_by_setting(configs: list[DecoderConfig]) -> dict[type, dict[str, set[str]]]:
    """By dataclass and field, the values that it takes in these, and its default."""
    found: dict[type, dict[str, set[str]]] = {}

    def look(value: Any) -> None:
        if isinstance(value, tuple):
            for entry in value:
                look(entry)
        elif dataclasses.is_dataclass(value):
            own = found.setdefault(type(value), defaultdict(set))
            for setting in dataclasses.fields(value):
                content = getattr(value, setting.name)
                own[setting.name] |= {repr(content), repr(setting.default)}
                look(content)

    for config in configs:
        look(config)
    return found
